"""The picture of the comparison on unequal devices: throughput as part of what the devices do alone."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.unequal.result import WAYS, Result
from revdist.reporting.figure import house_style

COLORS = {"plain": "#888888", "proportional": "#e69f00", "revdist": "#0072b2"}
WIDTH = 0.26


def draw(result: Result, path: Path) -> None:
    """Write the figure."""
    with house_style():
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots()
        for offset, (way, label) in enumerate(WAYS.items()):
            heights = [result.median(case, lambda each, way=way: each.of_sum(way)) for case in result.cases]  # type: ignore[misc]
            places = [number + (offset - 1) * WIDTH for number in range(len(heights))]
            axes.bar(places, heights, WIDTH * 0.92, color=COLORS[way], label=label)
            for place, height in zip(places, heights, strict=True):
                axes.annotate(f"{height:.2f}", (place, height), ha="center", va="bottom", fontsize=8)
        axes.axhline(1, color="#1f2933", linewidth=0.8)
        axes.set_xticks(range(len(result.cases)), [case.title.replace(" ", "\n", 1) for case in result.cases])
        axes.set(ylabel="samples a second / sum of each device alone")
        axes.set_title("Two unequal devices, together")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=160)

"""The picture of the comparison on unequal devices: throughput as part of what the devices do alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.unequal.result import WAYS, Result, Round
from revdist.reporting.figure import house_style

COLORS = {"plain": "#888888", "proportional": "#e69f00", "revdist": "#0072b2"}
WIDTH = 0.26


def draw(result: Result, path: Path) -> None:
    """Write the figure."""
    with house_style():
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots()
        for offset, (way, label) in enumerate(WAYS.items()):
            value: Callable[[Round], float] = lambda each, way=way: each.of_sum(way)  # type: ignore[misc]  # noqa: E731
            heights = [finding.typical(value) for finding in result.findings]
            spreads = [finding.spread(value) for finding in result.findings]
            places = [number + (offset - 1) * WIDTH for number in range(len(heights))]
            axes.bar(places, heights, WIDTH * 0.92, color=COLORS[way], label=label)
            for place, height, (low, high) in zip(places, heights, spreads, strict=True):
                axes.plot([place, place], [low, high], color="#1f2933", linewidth=1.2)
                top = max(height, high)
                axes.annotate(
                    f"{height:.2f}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=8
                )
        cases = [finding.case for finding in result.findings]
        axes.axhline(1, color="#1f2933", linewidth=0.8)
        axes.set_xticks(range(len(cases)), [case.title.replace(" ", "\n", 1) for case in cases])
        axes.set(ylabel="samples a second / sum of each device alone")
        axes.set_title("Two unequal devices, together")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=160)

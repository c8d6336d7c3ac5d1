"""The picture of the comparison: time of a step against its peak memory, one panel a depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.peers.cost import Cost
from revdist.reporting.figure import house_style
from revdist.reporting.palette import INK, MUTED, RANK_COLORS

OURS = "#0072b2"
MARKERS = "sD^vP*X"
MIB = 2**20


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Write the figure: revdist's schedules as one line, every other way as a point."""
    depths = list(dict.fromkeys(cost.depth for cost in costs))
    with house_style():
        figure = Figure(figsize=(max(6.0, 3.6 * len(depths)), 4.4), layout="constrained")
        panels = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
        for axes, depth in zip(panels, depths, strict=True):
            _draw_depth(axes, [cost for cost in costs if cost.depth == depth])
            axes.set_title(f"{depth} couplings")
        panels[0].set_ylabel("CPU time of a step, plain autograd = 1")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=160)


def _draw_depth(axes: Axes, costs: Sequence[Cost]) -> None:
    ours = sorted((cost for cost in costs if cost.key.startswith("revdist")), key=lambda cost: cost.peak_bytes)
    axes.plot([_x(cost) for cost in ours], [cost.time_ratio for cost in ours], "o-", color=OURS, label="revdist")
    _name(axes, ours[0], "all INVERT", (-4, -14), "left")
    _name(axes, ours[-1], "all SAVE", (-9, -5), "right")
    others = [cost for cost in costs if cost not in ours]
    for cost, marker, color in zip(others, MARKERS, (INK, MUTED, *RANK_COLORS[1:]), strict=False):
        axes.plot(_x(cost), cost.time_ratio, marker, color=color, markersize=7, label=cost.label)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.minorticks_off()
    axes.set_xlabel("peak memory of a step, MiB (log)")
    axes.margins(x=0.1, y=0.12)


def _name(axes: Axes, cost: Cost, text: str, offset: tuple[int, int], side: Literal["left", "right"]) -> None:
    point = _x(cost), cost.time_ratio
    axes.annotate(text, point, xytext=offset, textcoords="offset points", ha=side, fontsize=8, color=OURS)


def _x(cost: Cost) -> float:
    return cost.peak_bytes / MIB

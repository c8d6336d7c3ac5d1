"""The picture of the comparison: time of a step against its peak memory, one panel a depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers.cost import Cost
from revdist.reporting.figure import house_style
from revdist.reporting.palette import INK, MUTED

OURS = "#0072b2"
MIB = 2**20


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Write the figure: revdist's schedules as one line, every other library as a point with its name."""
    depths = list(dict.fromkeys(cost.depth for cost in costs))
    with house_style():
        figure = Figure(figsize=(4.2 * len(depths), 4.2), layout="constrained")
        panels = figure.subplots(1, len(depths), squeeze=False)[0]
        for axes, depth in zip(panels, depths, strict=True):
            _draw_depth(axes, [cost for cost in costs if cost.depth == depth])
            axes.set_title(f"{depth} couplings")
        panels[0].set_ylabel("CPU time of a step, plain autograd = 1")
        figure.savefig(path, dpi=160)


def _draw_depth(axes: Axes, costs: Sequence[Cost]) -> None:
    ours = sorted((cost for cost in costs if cost.key.startswith("revdist")), key=lambda cost: cost.peak_bytes)
    axes.plot([_x(cost) for cost in ours], [cost.time_ratio for cost in ours], "o-", color=OURS, label="revdist")
    for cost in (ours[0], ours[-1]):
        _name(axes, cost, cost.label.removeprefix("revdist, "), OURS)
    for cost in costs:
        if cost not in ours:
            axes.plot(_x(cost), cost.time_ratio, "D", color=MUTED, markersize=5)
            _name(axes, cost, cost.label, INK)
    axes.set_xscale("log")
    axes.set_xlabel("peak memory of a step, MiB (log)")
    axes.margins(x=0.12, y=0.12)
    axes.legend(loc="upper right")


def _x(cost: Cost) -> float:
    return cost.peak_bytes / MIB


def _name(axes: Axes, cost: Cost, text: str, color: str) -> None:
    axes.annotate(text, (_x(cost), cost.time_ratio), xytext=(6, 5), textcoords="offset points", fontsize=8, color=color)

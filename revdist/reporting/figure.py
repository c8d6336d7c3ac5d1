"""How every figure of ours looks, and the bytes it is written as."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from revdist.planning.costs import Mode
from revdist.reporting.palette import FAINT, INK, MODE_COLORS, MODE_WORDS, MUTED

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#cbd2d9",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "revdist",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8.5,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw inside this: figures made here look alike, and the caller's settings come back."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(rows: Sequence[float], *, width: float = 8.5, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per row, heights in inches. It belongs to no window and needs no closing."""
    figure = Figure(figsize=(width, sum(rows) + 0.35), layout="constrained")
    axes = figure.subplots(len(rows), 1, height_ratios=list(rows), sharex=share_x, squeeze=False)
    return figure, list(axes[:, 0])


def operators_axis(axes: Axes, num_operators: int, *, names: Sequence[str] = (), horizontal: bool = True) -> None:
    """Label the operators 0 .. n-1 in whole numbers, by name where there are few."""
    axis = axes.xaxis if horizontal else axes.yaxis
    if names and num_operators <= 24 and horizontal:
        axis.set_ticks(range(num_operators), list(names), rotation=45, ha="right", rotation_mode="anchor")
    else:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=min(num_operators, 12)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def mode_handles(modes: Iterable[Mode]) -> list[Patch]:
    return [Patch(facecolor=MODE_COLORS[mode], label=f"{mode.value} {MODE_WORDS[mode]}") for mode in modes]


def to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path, *, dpi: int = 160) -> None:
    with mpl.rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=dpi)

"""The picture of the validation: predicted against measured, bytes on the left, seconds on the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.memory.measuring import Finding
from revdist.reporting.figure import house_style

MIB = 2**20
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def draw(findings: Sequence[Finding], path: Path) -> None:
    """Write the figure."""
    with house_style():
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw(left, findings, lambda f: f.ledger_bytes / MIB, lambda f: f.predicted_bytes / MIB, "o", labels=True)
        on_device = [finding for finding in findings if finding.kernel_bytes is not None]
        _draw(left, on_device, lambda f: (f.kernel_bytes or 0) / MIB, lambda f: f.predicted_bytes / MIB, "x")
        left.set(xlabel="measured peak, MiB (o ledger, x kernel)", ylabel="predicted peak, MiB")
        left.set_title("Peak memory of a step")
        _draw(right, findings, lambda f: f.measured_s, lambda f: f.predicted_s, "o")
        right.set(xlabel="measured step time, CPU seconds", ylabel="predicted step time, CPU seconds")
        right.set_title("Step time")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=160)


def _draw(
    axes: Axes,
    findings: Sequence[Finding],
    across: Callable[[Finding], float],
    up: Callable[[Finding], float],
    marker: str,
    *,
    labels: bool = False,
) -> None:
    for number, network in enumerate(dict.fromkeys(finding.network for finding in findings)):
        mine = [finding for finding in findings if finding.network == network]
        axes.plot(
            [across(finding) for finding in mine],
            [up(finding) for finding in mine],
            marker,
            color=COLORS[number % len(COLORS)],
            markersize=4,
            label=network if labels else None,
        )
    ends = [0, max(max(across(finding), up(finding)) for finding in findings)]
    axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)

"""What one run of the validation found: as tables, as JSON and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory.measuring import Finding
from benchmarks.memory.training import Whole
from benchmarks.page import page
from benchmarks.table import Table

MIB = 2**20
GOAL_ERROR = 0.03
GOAL_TIME_ERROR = 0.10
MARGIN_BYTES = 2**20
FRAGMENTATION = 0.02
"""What every run leaves free by default for what is not a tensor: `memory.margin` and `memory.fragmentation`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    about: dict[str, Any]
    findings: tuple[Finding, ...]
    wholes: tuple[Whole, ...]

    def tables(self) -> Iterator[Table]:
        yield _summary(self.findings)
        yield _whole_table(self.wholes)
        yield _goal_table(self.findings, self.wholes)

    def write(self, folder: Path, name: str, *, figure: str) -> list[Path]:
        """Write `name`.json and `name`.md; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        content = {
            "about": self.about,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "trainings": [dataclasses.asdict(whole) for whole in self.wholes],
        }
        paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        tables = [*self.tables(), _details(self.findings)]
        text = page("Predicted and measured", self.about, tables, figure=figure, caption="predicted over measured")
        paths[1].write_text(text, encoding="utf-8")
        return paths


def over_budget(findings: Iterable[Finding]) -> int:
    """Planned schedules whose peak by the ledger exceeds their budget."""
    return sum(f.budget_bytes is not None and f.ledger_bytes > f.budget_bytes for f in findings)


def over_budget_by_kernel(findings: Iterable[Finding]) -> int:
    """The same by the kernel, whose bytes beside tensors the margins are for."""
    return sum(
        f.budget_bytes is not None
        and f.kernel_bytes is not None
        and f.kernel_bytes > f.budget_bytes * (1 + FRAGMENTATION) + MARGIN_BYTES
        for f in findings
    )


def _summary(findings: Sequence[Finding]) -> Table:
    rows = []
    for network in dict.fromkeys(finding.network for finding in findings):
        mine = [finding for finding in findings if finding.network == network]
        errors = [finding.error for finding in mine]
        kernel = [finding.kernel_error for finding in mine if finding.kernel_error is not None]
        times = [abs(finding.time_error) for finding in mine]
        rows.append(
            [
                network,
                str(len(mine)),
                f"{min(f.ledger_bytes for f in mine) / MIB:.0f} to {max(f.ledger_bytes for f in mine) / MIB:.0f}",
                f"{min(errors):+.2%}",
                f"{statistics.mean(errors):+.2%}",
                f"{max(errors):+.2%}",
                f"{statistics.mean(kernel):+.2%}" if kernel else "",
                f"{min(kernel):+.2%}" if kernel else "",
                f"{over_budget(mine)}",
                f"{statistics.mean(times):.1%}",
                f"{max(times):.1%}",
            ]
        )
    return Table(
        title="Predicted over measured",
        columns=[
            "network",
            "schedules",
            "peak, MiB",
            "peak, lowest",
            "mean",
            "highest",
            "by the kernel, mean",
            "lowest",
            "over budget",
            "step time off, mean",
            "most",
        ],
        rows=rows,
    )


def _whole_table(wholes: Sequence[Whole]) -> Table:
    return Table(
        title="Whole training steps: peak over all phases, MiB",
        columns=[
            "network",
            "optimizer",
            "gradients in buckets",
            "fixed, predicted",
            "fixed, after",
            "peak, predicted",
            *(f"step {number + 1}" for number in range(max((len(w.peaks_bytes) for w in wholes), default=0))),
            "predicted over largest",
        ],
        rows=[
            [
                whole.network,
                whole.optimizer,
                "yes" if whole.as_view else "no",
                f"{whole.fixed_bytes / MIB:.2f}",
                f"{whole.settled_bytes / MIB:.2f}",
                f"{whole.predicted_bytes / MIB:.2f}",
                *(f"{peak / MIB:.2f}" for peak in whole.peaks_bytes),
                f"{whole.error:+.3%}",
            ]
            for whole in wholes
        ],
    )


def _goal_table(findings: Sequence[Finding], wholes: Sequence[Whole]) -> Table:
    errors = [finding.error for finding in findings]
    kernel = [abs(finding.kernel_error) for finding in findings if finding.kernel_error is not None]
    times = [abs(finding.time_error) for finding in findings]
    planned = [finding for finding in findings if finding.budget_bytes is not None]
    low = sum(error < 0 for error in errors)
    over, over_kernel = over_budget(planned), over_budget_by_kernel(planned)
    low_wholes = sum(whole.error < 0 for whole in wholes)
    rows = [
        _goal("predictions below the ledger's peak", "0", f"{low} of {len(errors)}", low == 0),
        _goal("plans over budget", "0", f"{over} of {len(planned)}", over == 0),
        _mean("mean error of the peak", errors, GOAL_ERROR),
        _mean("mean error of the peak, by the kernel", kernel, GOAL_ERROR),
        _goal("plans over budget and margins by the kernel", "0", str(over_kernel), over_kernel == 0),
        _mean("mean error of the step time", times, GOAL_TIME_ERROR),
        _goal("whole trainings above their prediction", "0", f"{low_wholes} of {len(wholes)}", low_wholes == 0),
    ]
    colors = {"met": "green", "missed": "red"}
    return Table(title="Goals", columns=["goal", "wanted", "measured", ""], rows=rows, colors=colors)


def _goal(name: str, wanted: str, measured: str, met: bool) -> list[str]:
    return [name, wanted, measured, "met" if met else "missed"]


def _mean(name: str, values: Sequence[float], limit: float) -> list[str]:
    mean = statistics.mean(values) if values else 0.0
    return _goal(name, f"at most {limit:.0%}", f"{mean:.1%}", abs(mean) <= limit)


def _details(findings: Sequence[Finding]) -> Table:
    return Table(
        title="Every schedule",
        columns=["network", "kind", "schedule", "budget", "predicted", "ledger", "kernel", "predicted s", "measured s"],
        rows=[
            [
                f.network,
                f.kind,
                f.strip,
                "" if f.budget_bytes is None else f"{f.budget_bytes / MIB:.2f}",
                f"{f.predicted_bytes / MIB:.2f}",
                f"{f.ledger_bytes / MIB:.2f}",
                "" if f.kernel_bytes is None else f"{f.kernel_bytes / MIB:.2f}",
                f"{f.predicted_s:.3f}",
                f"{f.measured_s:.3f}",
            ]
            for f in findings
        ],
    )

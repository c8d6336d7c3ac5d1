"""What the faults cost, as a table, as JSON and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import page
from benchmarks.recovery.watching import Pause
from benchmarks.table import Table


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault done to one job."""

    subject: str
    fault: str
    pause: Pause | None
    """None where steps did not go on within the limit, or nothing could be done."""
    limit_s: float = 0.0
    first_step_s: float | None = None
    """From the launch to the end of the first step."""
    note: str = ""
    """Why there is nothing to measure."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    about: dict[str, Any]
    subjects: tuple[str, ...]
    faults: tuple[str, ...]
    findings: tuple[Finding, ...]

    def tables(self) -> Iterator[Table]:
        rows = [[subject, self._first_step(subject), *self._cells(subject)] for subject in self.subjects]
        yield Table(
            title="Pause until steps go on, and steps taken again",
            columns=["launcher", "first step", *self.faults],
            rows=rows,
            words=True,
        )

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write `name`.json and `name`.md; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        content = {"about": self.about, "findings": [dataclasses.asdict(finding) for finding in self.findings]}
        paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(page("Faults", self.about, self.tables()), encoding="utf-8")
        return paths

    def _first_step(self, subject: str) -> str:
        seconds = [f.first_step_s for f in self.findings if f.subject == subject and f.first_step_s is not None]
        return f"{statistics.median(seconds):.1f} s" if seconds else "-"

    def _cells(self, subject: str) -> Iterator[str]:
        for fault in self.faults:
            yield cell([f for f in self.findings if (f.subject, f.fault) == (subject, fault)])


def cell(findings: Sequence[Finding]) -> str:
    """What the rounds of one fault to one launcher came to."""
    if not findings:
        return "-"
    pauses = [finding.pause for finding in findings if finding.pause is not None]
    if not pauses:
        return findings[0].note or f"not in {findings[0].limit_s:.0f} s"
    seconds, lost = [one.seconds for one in pauses], [one.steps_lost for one in pauses]
    spread = f"{min(seconds):.2f}-{max(seconds):.2f}" if len(pauses) > 1 else f"{seconds[0]:.2f}"
    some = "" if len(pauses) == len(findings) else f" ({len(findings) - len(pauses)} of {len(findings)} never)"
    return f"{spread} s, {round(statistics.median(lost))} steps{some}"

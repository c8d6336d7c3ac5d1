"""What the comparison on unequal devices found: as a table, as JSON and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.table import Table
from benchmarks.unequal.cases import Case
from benchmarks.unequal.ways import Outcome

GOAL_OF_PLAIN = 0.98
"""Least throughput on equal devices, as part of plain DDP's."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """All ways in one case, one right after the other."""

    case: Case
    alone: tuple[Outcome, Outcome]
    apart: float
    """Two trainings at once that exchange nothing, as part of each alone: what this machine allows at most."""
    plain: Outcome
    proportional: Outcome
    revdist: Outcome

    @property
    def sum_of_alone(self) -> float:
        """Samples a second of both devices, each without the other."""
        return sum(outcome.samples_per_s for outcome in self.alone)

    def of_sum(self, way: str) -> float:
        """Throughput as part of the sum of the devices alone."""
        return self.speed(way) / self.sum_of_alone

    def speed(self, way: str) -> float:
        outcome: Outcome = getattr(self, way)
        return outcome.samples_per_s_overall if self.case.taken else outcome.samples_per_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    about: dict[str, Any]
    rounds: tuple[Round, ...]

    @property
    def cases(self) -> list[Case]:
        return list({each.case.key: each.case for each in self.rounds}.values())

    def median(self, case: Case, value: Callable[[Round], float]) -> float:
        """Over the rounds of a case."""
        return statistics.median(value(each) for each in self.rounds if each.case == case)

    def tables(self) -> Iterator[Table]:
        yield self._throughput()
        yield self._goals()

    def write(self, folder: Path, name: str, *, figure: str) -> list[Path]:
        """Write `name`.json and `name`.md; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        content = {"about": self.about, "rounds": [dataclasses.asdict(each) for each in self.rounds]}
        paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(self._as_markdown(figure), encoding="utf-8")
        return paths

    def _throughput(self) -> Table:
        rows = [
            [
                case.title,
                f"{self.median(case, lambda each: each.sum_of_alone):.0f}",
                *(f"{self.median(case, lambda each, way=way: each.speed(way)):.0f}" for way in WAYS),  # type: ignore[misc]
                *(f"{self.median(case, lambda each, way=way: each.of_sum(way)):.3f}" for way in WAYS),  # type: ignore[misc]
                f"{self.median(case, lambda each: each.apart):.3f}",
            ]
            for case in self.cases
        ]
        columns = ["samples a second", "sum alone", *WAYS.values(), *(f"{name} / sum" for name in WAYS.values()),
                   "apart / sum"]  # fmt: skip
        return Table(title="Two devices together, and what each does alone", columns=columns, rows=rows)

    def _goals(self) -> Table:
        rows = []
        for case in self.cases:
            if case.goal is not None:
                reached = self.median(case, lambda each: each.of_sum("revdist"))
                rows.append([f"{case.title}: part of the sum alone", f"{reached:.3f}", f">= {case.goal}"])
            if case.key == "equal":
                reached = self.median(case, lambda each: each.speed("revdist") / each.speed("plain"))
                rows.append([f"{case.title}: part of plain DDP's speed", f"{reached:.3f}", f">= {GOAL_OF_PLAIN}"])
        rows = [[*row, "yes" if float(row[1]) >= float(row[2][3:]) else "no"] for row in rows]
        return Table(title="Goals, medians of ratios within a round", columns=["goal", "measured", "wanted", "met"],
                     rows=rows, colors={"yes": "green", "no": "red"})  # fmt: skip

    def _as_markdown(self, figure: str) -> str:
        about = self.about
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        machine = f"{about['hardware']['cpu']} ({about['hardware']['num_cores']} cores), {versions}"
        head = (
            f"# Unequal devices, {about['date'][:10]}\n\n{about['method']}\n\n"
            f"`{about['command']}` on {machine}.\n\n![Throughput by case]({figure})\n"
        )
        return "\n".join([head, *(table.as_markdown() for table in self.tables())])


WAYS = {"plain": "plain DDP, equal", "proportional": "proportional", "revdist": "revdist"}

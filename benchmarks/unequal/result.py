"""What the comparison on unequal devices found: as a table, as JSON and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.page import page
from benchmarks.quartiles import quartiles
from benchmarks.table import Table
from benchmarks.unequal.cases import Case
from benchmarks.unequal.job import Turn
from benchmarks.unequal.losses import Losses

GOAL_OF_PLAIN = 0.98
"""Least throughput on equal devices, as part of plain DDP's: 1 / 1.02 of its step time."""
WAYS = {"plain": "plain DDP, equal", "proportional": "proportional", "revdist": "revdist"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A turn of every way in one case, one right after the other."""

    alone: tuple[Turn, Turn]
    apart: Turn
    by_hand_alone: tuple[Turn, Turn]
    plain: Turn
    proportional: Turn
    revdist: Turn

    @property
    def sum_of_alone(self) -> float:
        """Samples a second of both devices under revdist, each without the other."""
        return sum(turn.samples_per_s for turn in self.alone)

    def speed(self, way: str) -> float:
        turn: Turn = getattr(self, way)
        return turn.samples_per_s

    def of_sum(self, way: str) -> float:
        """Throughput as part of the sum of the devices alone."""
        return self.speed(way) / self.sum_of_alone

    @property
    def apart_of_sum(self) -> float:
        """What two trainings keep of their speed where both cores compute, though they exchange nothing."""
        return self.apart.samples_per_s / sum(turn.samples_per_s for turn in self.by_hand_alone)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """All rounds of a case."""

    case: Case
    proportional_shares: tuple[int, int]
    revdist_shares: tuple[int, ...]
    """At the end."""
    losses: Losses
    """Of revdist's steps."""
    rounds: tuple[Round, ...]

    def typical(self, value: Callable[[Round], float]) -> float:
        """The median over rounds; the mean where rounds differ on purpose, as memory changes."""
        values = [value(each) for each in self.rounds]
        return statistics.fmean(values) if self.case.taken else statistics.median(values)

    def calm(self, value: Callable[[Round], float]) -> float:
        """The upper quartile over rounds of a throughput: what is reached while nobody else slows the machine down."""
        return quartiles([value(each) for each in self.rounds])[2]

    def calm_of_sum(self, way: str) -> float:
        return self.calm(lambda each: each.speed(way)) / self._calm_sum(lambda each: each.alone)

    @property
    def calm_of_plain(self) -> float:
        return self.calm(lambda each: each.speed("revdist")) / self.calm(lambda each: each.speed("plain"))

    @property
    def calm_apart(self) -> float:
        return self.calm(lambda each: each.speed("apart")) / self._calm_sum(lambda each: each.by_hand_alone)

    def _calm_sum(self, pair: Callable[[Round], tuple[Turn, Turn]]) -> float:
        return sum(self.calm(lambda each, rank=rank: pair(each)[rank].samples_per_s) for rank in (0, 1))  # type: ignore[misc]

    def spread(self, value: Callable[[Round], float]) -> tuple[float, float]:
        """First and last quartile over rounds."""
        first, _, last = quartiles([value(each) for each in self.rounds])
        return first, last


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    about: dict[str, Any]
    findings: tuple[Finding, ...]

    def tables(self) -> Iterator[Table]:
        yield self._throughput()
        yield self._ratios()
        yield self._calm()
        yield self._losses()
        yield self._goals()

    def write(self, folder: Path, name: str, *, figure: str) -> list[Path]:
        """Write `name`.json and `name`.md; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        content = {"about": self.about, "cases": [dataclasses.asdict(each) for each in self.findings]}
        paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        text = page("Unequal devices", self.about, self.tables(), figure=figure, caption="Throughput by case")
        paths[1].write_text(text, encoding="utf-8")
        return paths

    def _throughput(self) -> Table:
        rows = [
            [
                finding.case.title,
                f"{finding.typical(lambda each: each.sum_of_alone):.0f}",
                *(f"{finding.typical(lambda each, way=way: each.speed(way)):.0f}" for way in WAYS),  # type: ignore[misc]
                "{}, {}".format(*finding.proportional_shares),
                ", ".join(str(share) for share in finding.revdist_shares),
            ]
            for finding in self.findings
        ]
        columns = ["samples a second", "sum alone", *WAYS.values(), "shares, proportional", "shares, revdist"]
        return Table(title="Two devices together, and what each does alone", columns=columns, rows=rows)

    def _ratios(self) -> Table:
        rows = []
        for finding in self.findings:
            values: list[Callable[[Round], float]] = [
                *((lambda each, way=way: each.of_sum(way)) for way in WAYS),  # type: ignore[misc]
                lambda each: each.speed("revdist") / each.speed("plain"),
                lambda each: each.apart_of_sum,
            ]
            rows.append([finding.case.title, *(_with_spread(finding, value) for value in values)])
        columns = ["part of the sum alone", *WAYS.values(), "revdist / plain DDP", "apart / alone, by hand"]
        return Table(title="Ratios within a round, with the quartiles over rounds", columns=columns, rows=rows)

    def _calm(self) -> Table:
        rows = [
            [
                finding.case.title,
                *(f"{finding.calm_of_sum(way):.2f}" for way in WAYS),
                f"{finding.calm_of_plain:.2f}",
                f"{finding.calm_apart:.2f}",
            ]
            for finding in self.findings
            if not finding.case.taken
        ]
        columns = ["part of the sum alone", *WAYS.values(), "revdist / plain DDP", "apart / alone, by hand"]
        return Table(title="Ratios of the upper quartiles over rounds: while the machine is calm", columns=columns,
                     rows=rows)  # fmt: skip

    def _losses(self) -> Table:
        rows = [
            [finding.case.title, *(f"{value:.1%}" for value in dataclasses.astuple(finding.losses))]
            for finding in self.findings
            if not finding.case.taken  # a device whose memory changes has no mean speed to compare with
        ]
        columns = [
            "part of the mean step",
            "all at work",
            "waiting: shares",
            "waiting: steps vary",
            "exchange, optimizer",
        ]
        return Table(title="Where revdist's time goes", columns=columns, rows=rows)

    def _goals(self) -> Table:
        rows = []
        for finding in self.findings:
            title = finding.case.title
            if finding.case.goal is not None:
                reached = finding.typical(lambda each: each.of_sum("revdist"))
                calm = finding.calm_of_sum("revdist")
                for how, value in (("median of ratios", reached), ("calm", calm)):
                    rows.append([f"{title}: part of the sum alone, {how}", f"{value:.3f}", f">= {finding.case.goal}"])
            if finding.case.key == "equal":
                reached = finding.typical(lambda each: each.speed("revdist") / each.speed("plain"))
                for how, value in (("median of ratios", reached), ("calm", finding.calm_of_plain)):
                    rows.append([f"{title}: part of plain DDP's speed, {how}", f"{value:.3f}", f">= {GOAL_OF_PLAIN}"])
        rows = [[*row, "yes" if float(row[1]) >= float(row[2][3:]) else "no"] for row in rows]
        return Table(title="Goals", columns=["goal", "measured", "wanted", "met"], rows=rows,
                     colors={"yes": "green", "no": "red"})  # fmt: skip


def _with_spread(finding: Finding, value: Callable[[Round], float]) -> str:
    first, last = finding.spread(value)
    return f"{finding.typical(value):.2f} ({first:.2f}-{last:.2f})"

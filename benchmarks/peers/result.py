"""What one run of the comparison found: as tables, as JSON and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import page
from benchmarks.peers.behaviour import Answer, Verdict
from benchmarks.peers.cost import Cost
from benchmarks.peers.extras import Buckets, Demotion
from benchmarks.peers.goals import Goal, bucket_goal, cost_goals, demotion_goal
from benchmarks.table import Table

MIB = 2**20


@dataclasses.dataclass(slots=True, kw_only=True)
class Result:
    """Filled while the benchmark runs; parts that were not asked for stay empty."""

    about: dict[str, Any]
    """Date, hardware, versions and settings."""
    labels: dict[str, str]
    """Per key of a library: its name and version."""
    questions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Per key of a probe: what it asks."""
    verdicts: dict[str, dict[str, Verdict]] = dataclasses.field(default_factory=dict)
    """Per probe and library."""
    buckets: dict[str, Buckets] = dataclasses.field(default_factory=dict)
    costs: list[Cost] = dataclasses.field(default_factory=list)
    demotions: list[Demotion] = dataclasses.field(default_factory=list)

    def goals(self) -> list[Goal]:
        goals = list(cost_goals(self.costs))
        if self.demotions:
            goals.append(demotion_goal(self.demotions))
        if self.buckets:
            goals.append(bucket_goal(self.buckets))
        return goals

    def tables(self) -> Iterator[Table]:
        if self.verdicts:
            yield _behaviour_table(self.labels, self.questions, self.verdicts)
        if self.buckets:
            yield _bucket_table(self.labels, self.buckets)
        for depth in dict.fromkeys(cost.depth for cost in self.costs):
            costs = [cost for cost in self.costs if cost.depth == depth]
            yield _cost_table(depth, costs)
            yield _plan_table(depth, costs)
        if self.demotions:
            yield _demotion_table(self.demotions)
        if goals := self.goals():
            yield _goal_table(goals)

    def write(self, folder: Path, name: str, *, figure: str = "") -> list[Path]:
        """Write `name`.json and `name`.md; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        content = dataclasses.asdict(self) | {
            "goals": [dataclasses.asdict(goal) | {"met": goal.met} for goal in self.goals()]
        }
        paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        paths[1].write_text(self._page(figure), encoding="utf-8")
        return paths

    def _page(self, figure: str) -> str:
        return page(
            "Reversible networks: revdist and other libraries",
            self.about,
            self.tables(),
            figure=figure,
            caption="step time against peak memory",
            remarks=_reasons(self.labels, self.questions, self.verdicts),
        )


def _cost_table(depth: int, costs: list[Cost]) -> Table:
    return Table(
        title=f"Step time and peak memory, {depth} couplings",
        columns=["", "time ms", "over plain", "quartiles", "peak MiB", "over plain", "gradient error"],
        rows=[
            [
                cost.label,
                f"{cost.step_s * 1e3:.0f}",
                f"{cost.time_ratio:.2f}",
                f"{cost.time_ratio_low:.2f}-{cost.time_ratio_high:.2f}",
                f"{cost.peak_bytes / MIB:.1f}",
                f"{cost.peak_ratio:.3f}",
                f"{cost.gradient_error:.0e}" if cost.gradient_error else "0",
            ]
            for cost in costs
        ],
    )


def _plan_table(depth: int, costs: list[Cost]) -> Table:
    fastest_s = next(cost.step_s for cost in costs if cost.key == "revdist-save")
    return Table(
        title=f"Plans of revdist, {depth} couplings: peak in MiB, time over that of all SAVE",
        columns=["budget", "predicted peak", "measured", "predicted time", "measured", "schedule"],
        rows=[
            [
                f"{cost.budget_bytes / MIB:.1f}",
                f"{cost.predicted_peak_bytes / MIB:.1f}",
                f"{cost.peak_bytes / MIB:.1f}",
                f"{cost.predicted_ratio:.3f}",
                f"{cost.step_s / fastest_s:.3f}",
                cost.schedule,
            ]
            for cost in costs
            if cost.budget_bytes is not None
        ],
    )


def _behaviour_table(
    labels: Mapping[str, str], questions: Mapping[str, str], verdicts: Mapping[str, Mapping[str, Verdict]]
) -> Table:
    return Table(
        title="Behaviour: right (yes), refused or crashed (no), wrong without a word (silent error)",
        columns=["", *labels.values()],
        rows=[[question, *(verdicts[key][name].answer for name in labels)] for key, question in questions.items()],
        colors={Answer.YES: "green", Answer.NO: "yellow", Answer.SILENT: "bold red"},
        words=True,
    )


def _reasons(
    labels: Mapping[str, str], questions: Mapping[str, str], verdicts: Mapping[str, Mapping[str, Verdict]]
) -> Iterator[str]:
    """Why an answer is not yes, in the words of the process that found out."""
    if verdicts:
        yield "### Behaviour: the reasons\n"
    for key, by_subject in verdicts.items():
        for name, verdict in by_subject.items():
            if verdict.answer is not Answer.YES:
                yield f"- {questions[key]}, {labels[name]}: {verdict.answer}. {verdict.detail}"
    yield ""


def _bucket_table(labels: Mapping[str, str], buckets: Mapping[str, Buckets]) -> Table:
    plain = buckets["plain"].num_early
    return Table(
        title="DDP: buckets of gradients launched during the backward",
        columns=["", "buckets", "before 80%", "over plain"],
        rows=[
            [
                labels[key],
                str(len(one.launched)),
                str(one.num_early),
                f"{one.num_early / plain:.2f}",
            ]
            for key, one in buckets.items()
        ],
    )


def _demotion_table(demotions: list[Demotion]) -> Table:
    return Table(
        title="Demotion between forward and backward, MiB",
        columns=["asked for", "says it released", "allocator got back"],
        rows=[
            [f"{value / MIB:.1f}" for value in (one.asked_bytes, one.said_bytes, one.freed_bytes)] for one in demotions
        ],
    )


def _goal_table(goals: list[Goal]) -> Table:
    return Table(
        title="Goals",
        columns=["", "limit", "measured", ""],
        rows=[
            [
                goal.name,
                f"{'>=' if goal.at_least else '<='} {goal.limit:.2f}",
                f"{goal.measured:.3f}",
                "met" if goal.met else "missed",
            ]
            for goal in goals
        ],
        colors={"met": "green", "missed": "bold red"},
    )

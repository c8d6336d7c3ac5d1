"""What one run of the comparison of planners found: as tables, as JSON and as a page of Markdown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import page
from benchmarks.planners.study import Score, Trial
from benchmarks.table import Table

MILLISECOND = 1e-3
GOAL_FAMILY, GOAL_LENGTH = "RevNet-like", 104
"""The chain for which the goals of time against peers hold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What revdist set out to reach, and whether it did."""

    name: str
    wanted: str
    measured: str
    met: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Scores of every planner on every chain."""

    about: dict[str, Any]
    """Date, hardware, versions and settings."""
    scores: tuple[Score, ...]

    def tables(self) -> Iterator[Table]:
        yield _summary(self.scores)
        yield goal_table(self.goals())

    def goals(self) -> list[Goal]:
        return list(_goals(self.scores))

    def write(self, folder: Path, name: str, *, figure: str) -> list[Path]:
        """Write `name`.json and `name`.md; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        head = {"about": self.about, "goals": [dataclasses.asdict(goal) for goal in self.goals()]}
        lines = ",\n".join(json.dumps(dataclasses.asdict(score)) for score in self.scores)
        paths[0].write_text(f'{json.dumps(head, indent=1)[:-2]},\n "scores": [\n{lines}\n]}}\n', encoding="utf-8")
        tables = [*self.tables(), *(_details(family, length, scores) for family, length, scores in self._by_chain())]
        text = page("Planners", self.about, tables, figure=figure, caption="planners compared")
        paths[1].write_text(text, encoding="utf-8")
        return paths

    def _by_chain(self) -> Iterator[tuple[str, int, list[Score]]]:
        for family, length in dict.fromkeys((score.family, score.num_operators) for score in self.scores):
            yield family, length, [s for s in self.scores if (s.family, s.num_operators) == (family, length)]


def over_budget(trials: Sequence[Trial]) -> int:
    """Plans that need more than they were allowed."""
    return sum(trial.need_bytes is not None and not trial.valid for trial in trials)


def _summary(scores: Sequence[Score]) -> Table:
    lengths = list(dict.fromkeys(score.num_operators for score in scores))
    rows = []
    for planner in dict.fromkeys(score.planner for score in scores):
        mine = [score for score in scores if score.planner == planner]
        by_length = [[score for score in mine if score.num_operators == length] for length in lengths]
        rows.append(
            [
                planner,
                *(_time([score.first_s for score in some]) for some in by_length),
                _time([score.solve_s for score in mine if score.num_operators == GOAL_LENGTH]),
                *_quality(mine),
            ]
        )
    return Table(
        title="Every planner, all chains",
        columns=[
            "planner",
            *(f"first plan, n={length}" for length in lengths),
            f"each further budget, n={GOAL_LENGTH}",
            *QUALITY_COLUMNS,
        ],
        rows=rows,
    )


QUALITY_COLUMNS = ("extra time, optimum = 1", "worst step time over optimum", "over budget", "no plan found")


def _details(family: str, length: int, scores: Sequence[Score]) -> Table:
    return Table(
        title=f"{family}, {length} operators",
        columns=["planner", "first plan", "each further budget", *QUALITY_COLUMNS],
        rows=[[s.planner, _time([s.first_s]), _time([s.solve_s]), *_quality([s])] for s in scores],
    )


def _quality(scores: Sequence[Score]) -> list[str]:
    """Cells for QUALITY_COLUMNS; times are of the plans that fit."""
    trials = [trial for score in scores for trial in score.trials]
    missing = sum(trial.need_bytes is None for trial in trials)
    over = f"{over_budget(trials)} of {len(trials)}"
    fits = [(score, trial) for score in scores for trial in score.trials if trial.valid]
    if not fits:
        return ["", "", over, str(missing)]
    ratio = sum(trial.extra_s for _, trial in fits) / sum(trial.optimum_s for _, trial in fits)
    worst = max((trial.extra_s - trial.optimum_s) / (score.base_s + trial.optimum_s) for score, trial in fits)
    return [f"{ratio:.4f}", f"{max(0.0, worst):+.2%}", over, str(missing)]


def _time(seconds: Sequence[float]) -> str:
    """Median milliseconds; empty where nothing was measured."""
    if not seconds:
        return ""
    value = statistics.median(seconds) / MILLISECOND
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.3f} ms"


def _goals(scores: Sequence[Score]) -> Iterator[Goal]:
    """The goals of time hold for the sizes of real networks; where a planner over its budget counts, for all."""
    ours = [score for score in scores if score.planner == "revdist"]
    real = {score.planner: score for score in _of(scores, GOAL_FAMILY, GOAL_LENGTH)}
    if {"revdist", "torch dp"} <= real.keys():
        peer_s = real["torch dp"].solve_s
        yield _ratio_goal("building every budget", peer_s / real["revdist"].build_s, 4)
        yield _ratio_goal("replanning", peer_s / real["revdist"].solve_s, 10)
    over = sum(over_budget(score.trials) for score in ours)
    total = sum(len(score.trials) for score in ours)
    yield Goal(name="plans over budget, all chains", wanted="0", measured=f"{over} of {total}", met=over == 0)
    yield from _limit_goal(_of(ours, GOAL_FAMILY, 104), lambda score: score.build_s, "every budget", 0.010)
    yield from _limit_goal(_of(ours, GOAL_FAMILY, 1000), lambda score: score.build_s, "every budget", 1.0)
    yield from _limit_goal(_of(ours, GOAL_FAMILY, 300), lambda score: score.solve_s, "one look-up", 0.001)


def _of(scores: Sequence[Score], family: str, length: int) -> list[Score]:
    return [score for score in scores if (score.family, score.num_operators) == (family, length)]


def _ratio_goal(what: str, measured: float, wanted: float) -> Goal:
    return Goal(
        name=f"time of one torch dp call over {what}, {GOAL_FAMILY}, n={GOAL_LENGTH}",
        wanted=f"at least {wanted:.0f}",
        measured=f"{measured:.1f}",
        met=measured >= wanted,
    )


def _limit_goal(
    scores: Sequence[Score], seconds: Callable[[Score], float], what: str, limit_s: float
) -> Iterator[Goal]:
    for score in scores:
        yield Goal(
            name=f"{what}, {score.family}, n={score.num_operators}",
            wanted=f"below {_time([limit_s])}",
            measured=_time([seconds(score)]),
            met=seconds(score) < limit_s,
        )


def goal_table(goals: Sequence[Goal]) -> Table:
    return Table(
        title="Goals",
        columns=["goal", "wanted", "measured", ""],
        rows=[[goal.name, goal.wanted, goal.measured, "met" if goal.met else "missed"] for goal in goals],
        colors={"met": "green", "missed": "red"},
    )

"""Ask every planner for the same budgets, time it, and judge its plans by simulation."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from benchmarks.planners.checkpointing import EverySquareRoot, Rotor
from benchmarks.planners.families import FAMILIES, Chain
from benchmarks.planners.milp import Highs
from benchmarks.planners.solvers import (
    AllInvert,
    AllSave,
    PaperKnapsack,
    Planner,
    Revdist,
    RevdistOneBudget,
    TorchDynamic,
    TorchGreedy,
    TorchHirschberg,
    TorchInteger,
)
from revdist.errors import UsageError
from revdist.planning.frontier import solve
from revdist.planning.single import solve_at

T = TypeVar("T")

PLANNERS: tuple[type[Planner], ...] = (
    Revdist,
    RevdistOneBudget,
    PaperKnapsack,
    TorchDynamic,
    TorchHirschberg,
    TorchInteger,
    TorchGreedy,
    Highs,
    Rotor,
    EverySquareRoot,
    AllInvert,
    AllSave,
)
LONG = 100
"""Operators from which slow planners are asked for fewer budgets."""
NUM_BUDGETS = 25
REPEATS = 5
"""Timings of a call that takes less than SHORT_S; the median counts."""
SHORT_S = 0.1
REFERENCE_GUARANTEES = (1e-6, 1e-5, 1e-4)
"""What the optimum is known to: the first of them that can be proven."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One plan that was asked for."""

    budget_bytes: int
    optimum_s: float
    """Extra seconds of the best plan there is."""
    need_bytes: int | None
    """None: no plan was found, though one exists."""
    extra_s: float | None

    @property
    def valid(self) -> bool:
        return self.need_bytes is not None and self.need_bytes <= self.budget_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One planner on one chain."""

    planner: str
    family: str
    num_operators: int
    base_s: float
    build_s: float
    """CPU seconds before the first budget can be asked for."""
    solve_s: float
    """CPU seconds per budget after that, median."""
    trials: tuple[Trial, ...]

    @property
    def first_s(self) -> float:
        """CPU seconds to the first plan."""
        return self.build_s + self.solve_s


def study(lengths: Sequence[int], say: Callable[[str], None]) -> Iterator[Score]:
    """Scores of every planner on every family and length it is asked for."""
    for planner in PLANNERS:  # compile and import before anything is timed
        _score(planner, FAMILIES[0](10), _budgets(FAMILIES[0](10), 2))
    for length in lengths:
        for family in FAMILIES:
            chain = family(length)
            budgets = _budgets(chain, NUM_BUDGETS)
            for planner in PLANNERS:
                if length <= planner.longest:
                    say(f"{chain.family}, {length} operators: {planner.name}")
                    yield _score(planner, chain, _thinned(budgets, planner, length))


def _budgets(chain: Chain, count: int) -> list[tuple[int, float]]:
    """Budgets spread from the smallest plan to the largest useful one, with their optima."""
    frontier = solve(chain.profile)
    low, high = frontier.minimum_bytes, frontier.maximum_bytes
    budgets = [low + (high - low) * k // (count + 1) for k in range(1, count + 1)]
    if frontier.guarantee == 0:
        return [(budget, frontier.best(budget).extra_s) for budget in budgets]
    return [(budget, _optimum(chain, budget)) for budget in budgets]


def _optimum(chain: Chain, budget_bytes: int) -> float:
    for guarantee in REFERENCE_GUARANTEES:
        with contextlib.suppress(UsageError):
            return solve_at(chain.profile, budget_bytes, guarantee=guarantee).extra_s
    raise AssertionError(f"no optimum of {chain.family} with {chain.num_operators} operators")


def _thinned(budgets: list[tuple[int, float]], planner: type[Planner], length: int) -> list[tuple[int, float]]:
    count = planner.most_budgets if length >= LONG else len(budgets)
    if count >= len(budgets):
        return budgets
    return [budgets[round(k)] for k in np.linspace(0, len(budgets) - 1, count + 2)[1:-1]]


def _score(planner: type[Planner], chain: Chain, budgets: Sequence[tuple[int, float]]) -> Score:
    largest = max(budget for budget, _ in budgets)
    build_s, built = _timed(lambda: planner(chain, largest))
    solve_s, trials = [], []
    for budget, optimum_s in budgets:
        seconds, plan = _timed(lambda budget=budget: built.solve(budget))
        solve_s.append(seconds)
        answer = None if plan is None else built.judge(plan)
        trials.append(
            Trial(
                budget_bytes=budget,
                optimum_s=optimum_s,
                need_bytes=answer.need_bytes if answer else None,
                extra_s=answer.extra_s if answer else None,
            )
        )
    return Score(
        planner=planner.name,
        family=chain.family,
        num_operators=chain.num_operators,
        base_s=chain.profile.base_s,
        build_s=build_s,
        solve_s=statistics.median(solve_s),
        trials=tuple(trials),
    )


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of a call, the median of several where it is short."""
    seconds = []
    while True:
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
        if seconds[0] > SHORT_S or len(seconds) == REPEATS:
            return statistics.median(seconds), result

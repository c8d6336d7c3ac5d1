"""What every planner looks like here, and those that choose one mode per operator.

A planner is built for a chain and then asked for budgets. Both are timed: a planner that answers
every budget at once pays when it is built, one that solves each budget anew pays at each.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch._functorch._activation_checkpointing import knapsack

from benchmarks.planners.families import Chain
from revdist.errors import BudgetTooSmall
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.frontier import solve
from revdist.planning.replay import replay, uniform
from revdist.planning.single import solve_at


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a plan costs, found by simulating it."""

    need_bytes: int
    extra_s: float


class Planner(ABC):
    """One way to plan. Construction is the part that does not depend on the budget."""

    name: ClassVar[str]
    longest: ClassVar[int] = 1000
    """Longest chain it is asked for; beyond it a single answer takes minutes."""
    most_budgets: ClassVar[int] = 25
    """Budgets it is asked for on long chains."""

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        self.chain = chain

    @abstractmethod
    def solve(self, budget_bytes: int) -> object | None:
        """A plan in its own terms; None where it finds none. This is what is timed."""

    def judge(self, plan: object) -> Answer:
        """The plan's cost; by default the plan is one mode per operator."""
        judged = replay(self.chain.profile, plan)  # type: ignore[arg-type]
        return Answer(judged.need_bytes, judged.extra_s)


class Revdist(Planner):
    name = "revdist"

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        super().__init__(chain, largest_budget)
        self.frontier = solve(chain.profile)

    def solve(self, budget_bytes: int) -> object | None:
        try:
            return self.frontier.best(budget_bytes).modes
        except BudgetTooSmall:
            return None


class RevdistOneBudget(Planner):
    name = "revdist, one budget"
    guarantee = 1e-4

    def solve(self, budget_bytes: int) -> object | None:
        try:
            return solve_at(self.chain.profile, budget_bytes, guarantee=self.guarantee).modes
        except BudgetTooSmall:
            return None


class Uniform(Planner):
    """The same mode everywhere, whatever the budget."""

    mode: ClassVar[Mode]

    def solve(self, budget_bytes: int) -> object | None:
        return uniform(self.chain.profile, self.mode).modes


class AllInvert(Uniform):
    name = "all INVERT"
    mode = Mode.INVERT


class AllSave(Uniform):
    name = "all SAVE"
    mode = Mode.SAVE


class Knapsack(Planner):
    """SAVE or INVERT under one capacity, with the largest transient reserved, as in the paper.

    Where an operator has no inverse, its second option stands for it.
    """

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        super().__init__(chain, largest_budget)
        self.pairs = pairs = [(options[0], options[1]) for options in chain.profile.options]
        self.reserve = max(max(save.working_bytes, invert.working_bytes) for save, invert in pairs)
        self.reserve += sum(invert.held_bytes for _, invert in pairs)
        self.weights = [save.held_bytes - invert.held_bytes for save, invert in pairs]
        self.gains = [max(0.0, invert.extra_s - save.extra_s) for save, invert in pairs]

    def capacity(self, budget_bytes: int) -> int:
        return budget_bytes - self.chain.profile.outside_bytes - self.reserve

    def modes(self, saved: Sequence[int]) -> list[Mode]:
        chosen = set(saved)
        return [self.pairs[index][index not in chosen].mode for index in range(self.chain.num_operators)]


class PaperKnapsack(Knapsack):
    """The paper's problem, solved exactly: our own kernels with every transient set to zero."""

    name = "paper's knapsack"

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        super().__init__(chain, largest_budget)
        flat = [
            [Option(Mode.SAVE, weight, 0, 0.0), Option(Mode.INVERT, 0, 0, gain)]
            for weight, gain in zip(self.weights, self.gains, strict=True)
        ]
        self.frontier = solve(Profile.from_options(flat, base_s=chain.profile.base_s))

    def solve(self, budget_bytes: int) -> object | None:
        capacity = self.capacity(budget_bytes)
        if capacity < 0:
            return None
        chosen = self.frontier.best(capacity).modes
        return self.modes([index for index, mode in enumerate(chosen) if mode is Mode.SAVE])


class TorchKnapsack(Knapsack):
    """A solver of torch's partitioner, called as it calls it: weights as fractions of their sum."""

    function: ClassVar[Callable[[list[float], list[float], float], tuple[float, list[int], list[int]]]]

    def solve(self, budget_bytes: int) -> object | None:
        capacity = self.capacity(budget_bytes)
        if capacity < 0:
            return None
        total = sum(self.weights)
        weights = [weight / total for weight in self.weights]
        return self.modes(type(self).function(weights, self.gains, capacity / total)[1])


class TorchDynamic(TorchKnapsack):
    name = "torch dp"
    function = staticmethod(knapsack.dp_knapsack)


class TorchHirschberg(TorchKnapsack):
    name = "torch dp, Hirschberg"
    function = staticmethod(knapsack.dp_knapsack_sliding_hirschberg)


class TorchInteger(TorchKnapsack):
    name = "torch ilp"
    function = staticmethod(knapsack.ilp_knapsack)
    most_budgets = 5


class TorchGreedy(TorchKnapsack):
    name = "torch greedy"
    function = staticmethod(knapsack.greedy_knapsack)

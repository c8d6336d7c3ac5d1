"""Checkpoint planners, which know no inverse: they drop activations and run forwards again.

Both speak of the model of Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal
checkpointing for heterogeneous chains: how to train deep neural networks with limited memory"
(2019), whose planner is rotor. A plan of operators s..t, whose input is there already, is

    Last(s)            run s and keep everything, then its backward
    Save(s, rest)      run s and keep everything, do the rest, then the backward of s
    Again(s, m, right, left)   run s..m-1 keeping only the input of m, do m..t, then do s..m-1 from its input

Costs of operator i: forward and backward seconds; a, its output; full, all that autograd keeps of it;
d, the gradient of its output; what forward and backward need on top.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import numba
import numpy as np

from benchmarks.planners.families import Chain
from benchmarks.planners.solvers import Answer, Planner

NUM_SLOTS = 500
"""Memory is counted in this many slots, rotor's default."""
SAVE, UNREACHABLE = 0, -1


@dataclasses.dataclass(frozen=True, slots=True)
class Last:
    first: int


@dataclasses.dataclass(frozen=True, slots=True)
class Save:
    first: int
    rest: Plan


@dataclasses.dataclass(frozen=True, slots=True)
class Again:
    first: int
    middle: int
    right: Plan
    left: Plan


Plan = Last | Save | Again


class Costs:
    """The chain in the terms of the paper; the largest transients are those of SAVE."""

    def __init__(self, chain: Chain) -> None:
        saves = [options[0] for options in chain.profile.options]
        self.output = np.array(chain.boundary_bytes)
        self.full = np.array([save.held_bytes for save in saves])
        self.gradient = self.output
        self.forward_top = np.zeros_like(self.output)
        self.backward_top = np.array([save.working_bytes for save in saves]) - self.gradient
        self.forward_s = np.array(chain.forward_s)
        self.step_s = float(self.forward_s.sum())


def evaluate(costs: Costs, plan: Plan, last: int) -> tuple[float, int]:
    """Forward seconds and peak bytes of a plan up to operator `last`, by going through it."""
    first = plan.first
    saved = costs.full[first]
    if not isinstance(plan, Again):
        peak = max(
            costs.gradient[last] + saved + costs.forward_top[first],
            costs.gradient[first] + saved + costs.backward_top[first],
        )
        if isinstance(plan, Last):
            return costs.forward_s[first], peak
        seconds, rest = evaluate(costs, plan.rest, last)
        return costs.forward_s[first] + seconds, max(peak, saved + rest)
    right_s, right = evaluate(costs, plan.right, last)
    left_s, left = evaluate(costs, plan.left, plan.middle - 1)
    peak = max(_forward_peak(costs, first, plan.middle, last), costs.output[plan.middle - 1] + right, left)
    return float(costs.forward_s[first : plan.middle].sum()) + right_s + left_s, peak


def _forward_peak(costs: Costs, first: int, middle: int, last: int) -> int:
    """Most bytes while operators first..middle-1 run forward, keeping nothing but the last output."""
    outputs, tops = costs.output[first:middle], costs.forward_top[first:middle]
    inputs = np.concatenate([[0], outputs[:-1]])
    return int(costs.gradient[last] + (inputs + outputs + tops).max())


class CheckpointPlanner(Planner):
    """Judges plans of the kind above."""

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        super().__init__(chain, largest_budget)
        self.costs = Costs(chain)
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 20 * chain.num_operators))

    def judge(self, plan: object) -> Answer:
        assert isinstance(plan, Plan)
        seconds, peak = evaluate(self.costs, plan, self.chain.num_operators - 1)
        return Answer(int(peak) + self.chain.profile.outside_bytes, seconds - self.costs.step_s)


class EverySquareRoot(CheckpointPlanner):
    """Keep the input of every sqrt(n)-th operator, whatever the budget (Chen et al., 2016)."""

    name = "checkpoint every sqrt(n)"

    def solve(self, budget_bytes: int) -> object | None:
        n = self.chain.num_operators
        starts = list(range(0, n, math.isqrt(n - 1) + 1))
        plan = _save_all(starts[-1], n)
        for first, middle in reversed(list(itertools.pairwise(starts))):
            plan = Again(first, middle, plan, _save_all(first, middle))
        return plan


def _save_all(first: int, end: int) -> Plan:
    plan: Plan = Last(end - 1)
    for operator in range(end - 2, first - 1, -1):
        plan = Save(operator, plan)
    return plan


class Rotor(CheckpointPlanner):
    """The published dynamic program, our own implementation; operators may run any number of times."""

    name = "rotor's DP"
    longest = 300

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        super().__init__(chain, largest_budget)
        self.slot = max(1.0, (largest_budget - chain.profile.outside_bytes) / NUM_SLOTS)
        costs = self.costs
        sizes = [
            np.ceil(size / self.slot).astype(np.int64)
            for size in (costs.output, costs.full, costs.gradient, costs.forward_top, costs.backward_top)
        ]
        self.seconds, self.choice = _fill(costs.forward_s, *sizes, NUM_SLOTS)
        self.output_slots, self.full_slots = sizes[:2]

    def solve(self, budget_bytes: int) -> object | None:
        slots = min(NUM_SLOTS, int((budget_bytes - self.chain.profile.outside_bytes) // self.slot))
        last = self.chain.num_operators - 1
        if slots < 0 or not np.isfinite(self.seconds[0, last, slots]):
            return None
        return self._plan(0, last, slots)

    def _plan(self, first: int, last: int, slots: int) -> Plan:
        if first == last:
            return Last(first)
        middle = int(self.choice[first, last, slots])
        if middle == SAVE:
            return Save(first, self._plan(first + 1, last, slots - self.full_slots[first]))
        right = self._plan(middle, last, slots - self.output_slots[middle - 1])
        return Again(first, middle, right, self._plan(first, middle - 1, slots))


@numba.njit(cache=True)
def _fill(forward_s, output, full, gradient, forward_top, backward_top, num_slots):  # type: ignore[no-untyped-def]
    """Least forward seconds of operators s..t within m slots, and the choice that reaches it (Theorem 1)."""
    n = len(forward_s)
    seconds = np.full((n, n, num_slots + 1), np.inf)
    choice = np.full((n, n, num_slots + 1), UNREACHABLE, np.int16)
    before = np.concatenate((np.zeros(1), np.cumsum(forward_s)))
    for length in range(1, n + 1):
        for s in range(n - length + 1):
            t = s + length - 1
            all_saved = max(gradient[t] + full[s] + forward_top[s], gradient[s] + full[s] + backward_top[s])
            if s == t:
                seconds[s, t, all_saved:] = forward_s[s]
                continue
            for m in range(max(all_saved, full[s]), num_slots + 1):
                seconds[s, t, m] = forward_s[s] + seconds[s + 1, t, m - full[s]]
                choice[s, t, m] = SAVE
            forward_peak = output[s] + forward_top[s]
            for middle in range(s + 1, t + 1):
                if middle - 1 > s:
                    j = middle - 1
                    forward_peak = max(forward_peak, output[j - 1] + output[j] + forward_top[j])
                kept = output[middle - 1]
                run_s = before[middle] - before[s]
                for m in range(max(gradient[t] + forward_peak, kept), num_slots + 1):
                    total = run_s + seconds[middle, t, m - kept] + seconds[s, middle - 1, m]
                    if total < seconds[s, t, m]:
                        seconds[s, t, m] = total
                        choice[s, t, m] = middle
    return seconds, choice

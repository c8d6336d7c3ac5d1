"""The benchmark's own rotor against every plan of its kind, so that the comparison is fair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

checkpointing = pytest.importorskip("benchmarks.planners.checkpointing")
families = pytest.importorskip("benchmarks.planners.families")

LENGTH = 5


def every_plan(first: int, last: int) -> Iterator[object]:
    if first == last:
        yield checkpointing.Last(first)
        return
    for rest in every_plan(first + 1, last):
        yield checkpointing.Save(first, rest)
    for middle in range(first + 1, last + 1):
        for right in every_plan(middle, last):
            for left in every_plan(first, middle - 1):
                yield checkpointing.Again(first, middle, right, left)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_rotor_finds_the_best_plan_that_fits(family) -> None:
    chain = family(LENGTH)
    costs = checkpointing.Costs(chain)
    plans = [checkpointing.evaluate(costs, plan, LENGTH - 1) for plan in every_plan(0, LENGTH - 1)]
    largest = max(peak for _, peak in plans)
    rotor = checkpointing.Rotor(chain, int(largest))
    slot = rotor.slot
    for budget in range(int(min(peak for _, peak in plans)), int(largest) + 1, int(largest) // 37):
        plan = rotor.solve(budget)
        # Sizes are rounded up to slots, one per size that is held at a time: between these two.
        at_most = min((s for s, peak in plans if peak <= budget - 2 * LENGTH * slot), default=float("inf"))
        at_least = min(s for s, peak in plans if peak <= budget)
        if plan is None:
            assert at_most == float("inf")
        else:
            seconds, peak = checkpointing.evaluate(costs, plan, LENGTH - 1)
            assert peak <= budget
            assert at_least - 1e-12 <= seconds <= at_most + 1e-12


def test_keeping_everything_costs_nothing_and_checkpoints_cost_a_forward() -> None:
    chain = families.distinct(9)
    planner = checkpointing.EverySquareRoot(chain, 0)
    answer = planner.judge(planner.solve(0))
    assert 0 < answer.extra_s < sum(chain.forward_s)
    assert checkpointing.Rotor(chain, 2**40).judge(checkpointing._save_all(0, 9)).extra_s == pytest.approx(0.0)

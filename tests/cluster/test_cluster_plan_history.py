"""Each step is told with the plan it was taken under, however many a run of days adopts."""

from __future__ import annotations

import dataclasses
import random

from revdist.cluster.plan_history import PlanHistory
from revdist.planning.costs import Mode, Plan, Schedule
from revdist.training.reports import PlanReport

PLAN = Plan(
    generation=0,
    rank=0,
    device="CPU-1",
    share=3,
    micro_batch=3,
    accumulation_steps=1,
    schedule=Schedule(modes=(Mode.SAVE,)),
    budget_bytes=0,
    predicted_step_s=1.0,
    predicted_peak_bytes=1,
    reason="start",
)


def report(step: int, budget_bytes: int) -> PlanReport:
    return PlanReport(
        time=0.0, step=step, plan=dataclasses.replace(PLAN, budget_bytes=budget_bytes), free_bytes=budget_bytes
    )


def test_a_step_has_the_plan_that_was_adopted_last_before_it() -> None:
    history = PlanHistory()
    assert history.newest(0) is None
    assert history.at(1, [0, None]) == [None, None]
    assert history.add(0, report(0, 10)) is None
    assert history.add(0, report(4, 11)) == report(0, 10).plan
    assert history.add(1, report(6, 12)) is None
    found = [[plan and plan.budget_bytes for plan in history.at(step, [1, 0])] for step in (1, 4, 5, 6, 7)]
    assert found == [[None, 10], [None, 10], [None, 11], [None, 11], [12, 11]]
    newest = history.newest(0)
    assert newest is not None
    assert newest.budget_bytes == 11
    history.clear()
    assert history.newest(0) is None


def test_plans_that_no_step_is_told_with_any_more_are_forgotten() -> None:
    """Plans and steps come from different ranks, in any order among each other."""
    random.seed(0)
    history, every, steps = PlanHistory(), list[PlanReport](), 0
    for number in range(2000):
        if random.random() < 0.5:
            adopted = report(random.randint(steps, steps + 3) if not every else max(every[-1].step, steps), number)
            history.add(0, adopted)
            every.append(adopted)
        else:
            steps += 1
            under = [one.plan for one in every if one.step < steps]
            assert history.at(steps, [0]) == [under[-1] if under else None]
            assert len(history._reports[0]) <= 1 + sum(one.step >= steps for one in every)

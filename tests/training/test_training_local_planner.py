"""From a budget to a plan, and what happens when a plan turns out not to fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from replicas import run_config

from revdist.errors import BudgetTooSmall, OutOfDeviceMemory
from revdist.planning.costs import Mode, Option, Profile
from revdist.training import local_planner
from revdist.training.local_planner import LocalPlanner

KIB = 1024


def profile(micro_batch: int) -> Profile:
    """Four operators that hold 10 KiB a sample when saved, and cost a millisecond a sample when inverted."""
    options = [
        Option(Mode.SAVE, 10 * KIB * micro_batch, 2 * KIB * micro_batch, 0.0),
        Option(Mode.INVERT, 0, 4 * KIB * micro_batch, 0.001 * micro_batch),
    ]
    return Profile.from_options([options] * 4, micro_batch=micro_batch, base_s=0.002 + 0.01 * micro_batch)


def planner(**changes: Any) -> LocalPlanner:
    config = run_config(**changes)
    profiles = [profile(1), profile(4)]
    return LocalPlanner(config, profiles, device="CPU-1", fixed_bytes=100 * KIB, step_peak_bytes=KIB)


def test_more_memory_saves_more() -> None:
    local = planner()
    local.start(1000 * KIB)
    rich = local.plan(4, rank=1, generation=0, reason="start")
    local.replan(20 * KIB, reason="memory-lost")
    poor = local.plan(4, rank=1, generation=0, reason="memory-lost")
    assert rich.schedule.strip == "SSSS"
    assert "I" in poor.schedule.strip
    assert poor.predicted_step_s > rich.predicted_step_s
    assert rich.predicted_peak_bytes == 100 * KIB + rich.schedule.need_bytes
    assert poor.schedule.need_bytes <= 20 * KIB


@pytest.mark.parametrize(("schedule", "strip"), [("save", "SSSS"), ("invert", "IIII")])
def test_a_schedule_can_be_asked_for(schedule: str, strip: str) -> None:
    local = planner(planning={"schedule": schedule})
    local.start(1000 * KIB)
    assert local.plan(4, rank=1, generation=0, reason="start").schedule.strip == strip


def test_a_start_without_room_says_how_much_is_missing() -> None:
    with pytest.raises(BudgetTooSmall, match=r"2.0 KiB missing") as caught:
        planner().start(2 * KIB)
    assert caught.value.missing_bytes == caught.value.minimum_bytes - 2 * KIB
    with pytest.raises(BudgetTooSmall, match="lower micro_batch"):
        planner(micro_batch=4).start(2 * KIB)


def test_below_the_minimum_a_running_replica_takes_the_smallest_plan() -> None:
    local = planner()
    local.start(1000 * KIB)
    local.replan(0, reason="memory-lost")
    assert local.budget_bytes == local.minimum_bytes == 4 * KIB


def test_a_plan_that_ran_out_gives_way_to_a_clearly_smaller_one() -> None:
    local = planner()
    local.start(1000 * KIB)
    plan = local.plan(4, rank=1, generation=0, reason="start")
    local.give_way(plan, budget_bytes=1000 * KIB)
    smaller = local.plan(4, rank=1, generation=0, reason="memory-lost")
    assert smaller.schedule.need_bytes <= 0.9 * plan.schedule.need_bytes


def test_a_reading_that_promised_too_much_is_not_believed_again() -> None:
    local = planner()
    local.start(1000 * KIB)
    plan = local.plan(4, rank=1, generation=0, reason="start")
    local.give_way(plan, budget_bytes=1000 * KIB)
    local.replan(1000 * KIB, reason="memory-gained")
    again = local.plan(4, rank=1, generation=0, reason="memory-gained")
    assert again.schedule.need_bytes < plan.schedule.need_bytes


def test_the_smallest_plan_cannot_give_way() -> None:
    local = planner()
    local.start(4 * KIB)
    plan = local.plan(4, rank=1, generation=0, reason="start")
    with pytest.raises(BudgetTooSmall, match=r"1\.0 KiB missing"):
        local.give_way(plan, budget_bytes=3 * KIB)
    with pytest.raises(OutOfDeviceMemory, match=r"needs 4\.0 KiB of the 5\.0 KiB"):
        local.give_way(plan, budget_bytes=5 * KIB)


def test_the_inverted_curve_is_slower_where_there_is_room() -> None:
    local = planner()
    local.start(1000 * KIB)
    assert local.inverted_curve().step_s(4) > local.curve.step_s(4)


def test_the_first_plan_is_the_fastest_or_the_thriftiest_without_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def solver(*_: Any, **__: Any) -> None:
        raise AssertionError("the first plan waits for the solver")

    monkeypatch.setattr(local_planner, "step_time_curve", solver)
    rich, poor = planner(), planner()
    rich.start(1000 * KIB)
    poor.start(100 * KIB)
    assert rich.plan(4, rank=1, generation=0, reason="start").schedule.strip == "SSSS"
    assert poor.plan(4, rank=1, generation=0, reason="start").schedule.strip == "IIII"
    assert poor.plan(4, rank=1, generation=0, reason="start").schedule.need_bytes <= 100 * KIB


def test_where_no_simple_plan_fits_the_solver_is_asked() -> None:
    local = planner()
    local.start(5 * KIB)  # less than the smaller of the two measured sizes needs
    assert local.plan(4, rank=1, generation=0, reason="start").micro_batch == 1


def test_runs_of_invert_obey_the_limit_from_the_start_on() -> None:
    errors = {"reconstruction_error": (1e-3,) * 4, "error_growth": (1.0,) * 4}
    profiles = [dataclasses.replace(profile(size), **errors) for size in (1, 4)]
    config = run_config(planning={"max_reconstruction_error": 2e-3})
    local = LocalPlanner(config, profiles, device="CPU-0", fixed_bytes=0, step_peak_bytes=0)
    local.start(local.minimum_bytes)
    assert local.plan(1, rank=1, generation=0, reason="start").schedule.strip == "ISII"
    local.replan(0, reason="memory-lost")
    assert local.plan(1, rank=1, generation=0, reason="memory-lost").schedule.strip == "ISII"
    assert local.inverted_curve().choice(1).schedule.strip == "ISII"
    assert local.never_inverted == {1}


def test_with_a_limit_an_error_that_nobody_measured_is_not_risked() -> None:
    local = planner(planning={"max_reconstruction_error": 1.0, "schedule": "invert"})
    local.start(1000 * KIB)
    assert local.plan(4, rank=1, generation=0, reason="start").schedule.strip == "SSSS"


def test_without_a_limit_everything_may_be_inverted_when_memory_is_short() -> None:
    assert planner().never_inverted == frozenset()

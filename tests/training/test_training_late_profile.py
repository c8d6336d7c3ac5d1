"""A model that was never seen trains at once, and is measured between its first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import Outcome, assert_no_failure, run_config, run_replicas
from test_training_replicas import largest_difference, train_alone

from revdist.errors import BudgetTooSmall
from revdist.planning.costs import Mode, Plan
from revdist.training.agreement import must_pool
from revdist.training.checkpoint_files import read_profiles
from revdist.training.local_planner import LocalPlanner
from revdist.training.reports import CurveReport, EventReport, FailureReport, PlanReport, StepReport
from revdist.training.row import Row, Stage

pytestmark = pytest.mark.usefixtures("devices_folder")
KIB = 1024
TIGHT = "600KiB"
"""Has no room for twelve samples at once."""


def order_of(outcome: Outcome, rank: int = 0) -> list[str]:
    """Steps, plans and profiles, as rank 0 told of them."""
    told = []
    for report in outcome.reports[rank]:
        if isinstance(report, StepReport):
            told.append(f"step {report.step}")
        elif isinstance(report, PlanReport):
            told.append(f"plan {report.plan.reason}")
        elif isinstance(report, EventReport) and report.kind == "profile":
            told.append("profile")
    return told


def plans(outcome: Outcome, rank: int) -> list[Plan]:
    return [report.plan for report in outcome.reports[rank] if isinstance(report, PlanReport)]


def test_the_first_step_waits_for_no_profile_and_the_plan_follows_as_a_replan(tmp_path: Path) -> None:
    outcome = run_replicas([run_config(global_batch=12, epochs=4)] * 2, [(6, 6)], tmp_path)
    assert_no_failure(outcome)
    told = order_of(outcome)
    assert told[:3] == ["plan start", "step 1", "step 2"]
    assert told[3:6] == ["profile", "step 3", "plan profile"], "two sizes after two steps, exchanged after the third"
    for rank in (0, 1):
        first, second, *_ = plans(outcome, rank)
        assert set(first.schedule.modes) <= {Mode.INVERT, Mode.RECOMPUTE}
        assert first.predicted_step_s == 0 < second.predicted_step_s
    assert {profile.micro_batch for profile in read_profiles(outcome.checkpoints)} == {1, 6}, "known to a resumed run"
    assert [step.step for step in outcome.steps()] == list(range(1, 21))
    config = run_config(global_batch=12, epochs=4)
    assert largest_difference(outcome.state(), train_alone(config, dtype=torch.float64)) < 1e-10


def test_no_step_takes_more_than_was_predicted_for_it(tmp_path: Path) -> None:
    """Also those between which the model is measured, and the first one that is planned."""
    config = run_config(model={"factory": "small_models:classifier", "kwargs": {"depth": 6}}, precision="fp32")
    outcome = run_replicas([config], [(12,)], tmp_path)
    assert_no_failure(outcome)
    rows = [step.rows[0] for step in outcome.steps()]
    assert all(row.peak_bytes <= row.predicted_peak_bytes for row in rows)
    planned = [row for row in rows if row.predicted_step_s > 0]
    assert max(row.peak_bytes for row in planned) >= 0.95 * planned[-1].predicted_peak_bytes - 4 * KIB


def test_shares_that_never_change_are_chosen_by_what_was_measured(tmp_path: Path) -> None:
    config = run_config(replan={"every_s": 0.05, "shares": False}, steps=2, epochs=None)
    outcome = run_replicas([config] * 2, [(6, 6)], tmp_path)
    assert_no_failure(outcome)
    assert order_of(outcome)[:2] == ["profile", "plan start"]
    assert all(report.curve.step_s(6) > 0 for report in outcome.of_kind(CurveReport))


def test_a_micro_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    config = run_config(
        data={"factory": "small_models:images", "kwargs": {"size": 24}},
        devices=[{"kind": "cpu", "name": "cpu-0", "capacity": TIGHT}],
        memory={"margin": 0},
        planning={"profile_repeats": 1, "profile_cache": False, "micro_batches": [12]},
        precision="fp32",
    )
    outcome = run_replicas([config], [(12,)], tmp_path)
    assert_no_failure(outcome)
    sizes = [plan.micro_batch for plan in plans(outcome, 0)]
    assert sizes[0] == 12
    assert min(sizes) < 12
    assert [step.step for step in outcome.steps()] == list(range(1, 11))


def test_where_a_size_does_not_fit_smaller_ones_stay_as_far_from_it(tmp_path: Path) -> None:
    """A line through two sizes next to each other shows noise, by which small micro-batches may look fast."""
    config = run_config(
        data={"factory": "small_models:images", "kwargs": {"size": 24}},
        devices=[{"kind": "cpu", "name": "cpu-0", "capacity": TIGHT}],
        memory={"margin": 0},
        planning={"profile_repeats": 1, "profile_cache": False, "micro_batches": [6, 12]},
        precision="fp32",
    )
    outcome = run_replicas([config], [(12,)], tmp_path)
    assert_no_failure(outcome)
    low, high = sorted(profile.micro_batch for profile in read_profiles(outcome.checkpoints))
    assert high < 12
    assert low == high // 2


def test_where_not_even_one_sample_fits_the_run_says_what_it_needs(tmp_path: Path) -> None:
    config = run_config(
        data={"factory": "small_models:images", "kwargs": {"size": 24}},
        devices=[{"kind": "cpu", "name": "cpu-0", "capacity": "280KiB"}],
        memory={"margin": 0},
        precision="fp32",
    )
    (failure,) = run_replicas([config], [(12,)], tmp_path).of_kind(FailureReport)
    assert isinstance(failure.error, BudgetTooSmall)
    assert failure.error.minimum_bytes > 280 * KIB


@pytest.mark.parametrize(
    ("stages", "pools"),
    [
        ((Stage.KNOWN, Stage.KNOWN), False),
        ((Stage.KNOWN, Stage.MEASURED), True),
        ((Stage.MEASURED, Stage.MEASURING), False),
        ((Stage.MEASURED, Stage.MEASURED), True),
    ],
)
def test_profiles_are_exchanged_once_none_is_to_come(stages: tuple[Stage, ...], pools: bool) -> None:
    assert must_pool([Row(profile_stage=stage) for stage in stages]) is pools


@pytest.mark.parametrize(
    ("changes", "modes"),
    [
        ({}, (Mode.INVERT, Mode.RECOMPUTE)),
        ({"schedule": "save"}, (Mode.SAVE, Mode.SAVE)),
        ({"max_reconstruction_error": 1e-3}, (Mode.RECOMPUTE, Mode.RECOMPUTE)),
        ({"modes": ["SAVE", "INVERT"]}, (Mode.INVERT, Mode.SAVE)),
    ],
)
def test_the_first_schedule_obeys_the_configuration(changes: dict[str, Any], modes: tuple[Mode, ...]) -> None:
    planner = LocalPlanner(
        run_config(planning=changes),
        (),
        device="CPU-0",
        fixed_bytes=10,
        step_peak_bytes=5,
        options=[(Mode.SAVE, Mode.INVERT, Mode.RECOMPUTE), (Mode.SAVE, Mode.RECOMPUTE)],
        first_micro_batch=3,
    )
    planner.start(1000)
    plan = planner.plan(12, rank=0, generation=0, reason="start")
    assert plan.schedule.modes == modes
    assert (plan.micro_batch, plan.accumulation_steps, plan.predicted_peak_bytes) == (3, 4, 1010)
    assert planner.give_way(plan, 1000).choice(12).micro_batch == 1
    with pytest.raises(torch.OutOfMemoryError, match="one"):
        planner.give_way(planner.plan(12, rank=0, generation=0, reason="memory-lost"), 1000)

"""A loss that is not finite ends the run or costs its step, and names its samples either way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from replicas import assert_no_failure, run_config, run_replicas
from test_training_replicas import largest_difference, train_alone

from revdist.config import RunConfig
from revdist.errors import NonFiniteLoss
from revdist.training.data import DataOrder
from revdist.training.non_finite import MOST_IN_A_ROW, Tolerance, non_finite_losses
from revdist.training.reports import EventReport, FailureReport
from revdist.training.row import Row

pytestmark = pytest.mark.usefixtures("devices_folder")

BATCH = np.array([7, 3, 11, 5])


def test_every_rank_whose_loss_is_not_finite_is_named_with_its_samples() -> None:
    rows = [Row(loss_sum=float("inf")), Row(loss_sum=1.0), Row(loss_sum=float("nan"), failed=True)]
    (error,) = non_finite_losses(rows, BATCH, (2, 1, 1), step=6)
    assert (error.facts["step"], error.facts["rank"], error.facts["samples"]) == (6, 0, [7, 3])
    assert "the loss of step 6 is inf on rank 0, samples 7, 3: lower the learning rate" in error.message


def test_only_so_many_steps_in_a_row_are_left_out() -> None:
    errors = non_finite_losses([Row(loss_sum=float("nan"))], BATCH, (4,), step=6)
    tolerance = Tolerance("skip")
    assert all(tolerance.bear(errors) for _ in range(MOST_IN_A_ROW))
    assert not tolerance.bear([])  # a good step, and it counts anew
    assert all(tolerance.bear(errors) for _ in range(MOST_IN_A_ROW))
    with pytest.raises(NonFiniteLoss, match="so were the 10 steps before") as caught:
        tolerance.bear(errors)
    assert caught.value.facts["samples"] == BATCH.tolist()
    with pytest.raises(NonFiniteLoss, match="step 6"):
        Tolerance("stop").bear(errors)


def poisoned(policy: str, **changes: object) -> tuple[RunConfig, list[int]]:
    """A run over data of which one sample makes the loss NaN, and the steps that it belongs to."""
    data = {"factory": "small_models:poisoned_images", "kwargs": {"samples": [40]}}
    config = run_config(data=data, non_finite=policy, evaluate=False, **changes)
    order = DataOrder(num_samples=50, global_batch=config.global_batch, seed=config.seed)
    return config, [step for step in range(10) if 40 in order.batch(step)]


def test_the_step_is_left_out_by_all_ranks_and_told_by_one(tmp_path: Path) -> None:
    config, bad = poisoned("skip")
    outcome = run_replicas([config] * 2, [(9, 3)], tmp_path)
    assert_no_failure(outcome)
    assert len(bad) == 2
    assert [step.step for step in outcome.steps() if not math.isfinite(step.loss)] == [step + 1 for step in bad]
    told = [event for event in outcome.of_kind(EventReport) if event.kind == "non-finite"]
    assert [event.step for event in sorted(told, key=lambda event: event.step)] == bad
    assert all(40 in event.facts["samples"] for event in told)
    assert all(f"is nan on rank {event.rank}, samples " in event.detail for event in told)
    assert largest_difference(outcome.state(), train_alone(config, dtype=torch.float64, left_out=bad)) < 1e-10


def test_statistics_do_not_keep_what_was_left_out(tmp_path: Path) -> None:
    model = {"factory": "small_models:classifier", "kwargs": {"norm": True}}
    config, _ = poisoned("skip", model=model, micro_batch=12)
    outcome = run_replicas([config], [(12,)], tmp_path)
    assert_no_failure(outcome)
    state = outcome.state()
    assert any("running_var" in name for name in state)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    counts = [int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert set(counts) == {8}


def test_the_run_stops_unless_told_otherwise(tmp_path: Path) -> None:
    config, bad = poisoned("stop")
    outcome = run_replicas([config] * 2, [(9, 3)], tmp_path)
    failures = outcome.of_kind(FailureReport)
    assert [failure.rank for failure in failures] == [0, 1]
    for failure in failures:
        assert isinstance(failure.error, NonFiniteLoss)
        assert failure.error.facts["step"] == bad[0]
        assert 40 in failure.error.facts["samples"]

"""A run goes on from its checkpoint on any number of replicas, and measures no known device again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from replicas import Outcome, assert_no_failure, run_config, run_replicas
from test_training_replicas import largest_difference, train_alone

from revdist.config import RunConfig
from revdist.planning.costs import Plan
from revdist.training.checkpoint_files import checkpoints, newest, read_profiles
from revdist.training.reports import EndReport, EventReport, FailureReport

pytestmark = pytest.mark.usefixtures("devices_folder")


def events(outcome: Outcome, kind: str) -> list[EventReport]:
    return [event for event in outcome.of_kind(EventReport) if event.kind == kind]


@pytest.mark.slow
def test_a_run_moves_from_one_replica_to_three_and_to_two(tmp_path: Path) -> None:
    # Momentum, a schedule over the whole run and two epochs: a step lost, repeated or done otherwise shows.
    config = run_config(optimizer={"kwargs": {"lr": 0.05, "momentum": 0.9}, "clip_norm": 0.5})
    parts = [
        run_replicas([config], [(12,)], tmp_path, stop_after=2),
        run_replicas([config] * 3, [(6, 1, 5)], tmp_path, resume=True, stop_after=5),
        run_replicas([config] * 2, [(3, 9)], tmp_path, resume=True),
    ]
    for part in parts:
        assert_no_failure(part)
    assert [len(part.of_kind(EndReport)) for part in parts] == [1, 3, 2]
    assert [step.step for part in parts for step in part.steps()] == list(range(1, 11))
    assert [sum(row.samples for row in step.rows) for part in parts for step in part.steps()] == [12, 12, 12, 12, 2] * 2
    assert largest_difference(parts[-1].state(), train_alone(config, dtype=torch.float64)) < 1e-10


def test_a_known_device_is_not_measured_again_on_another_machine(tmp_path: Path) -> None:
    config = run_config(steps=4, epochs=None, planning={"profile_repeats": 1, "profile_first": True})
    here, there = ({"REVDIST_CACHE_DIR": str(tmp_path / name)} for name in ("here", "there"))
    before = run_replicas([config] * 2, [(9, 3)], tmp_path, stop_after=1, environment=here)
    # Alone it has another share, for which it would choose other micro-batches to measure.
    after = run_replicas([config], [(12,)], tmp_path, resume=True, environment=there)
    for outcome, size, how in ((before, 2, "measured"), (after, 1, "from the cache")):
        assert_no_failure(outcome)
        assert [event.detail.split(" in ")[0] for event in events(outcome, "profile")] == [
            f"micro-batches of 1, 6 {how}"
        ] * size
    assert [step.step for step in before.steps() + after.steps()] == [1, 2, 3, 4]
    (resumed,) = events(after, "resumed")
    assert resumed.detail.startswith(f"{tmp_path}/checkpoints/step-000000002, written by python")


@pytest.mark.parametrize("when", [{"every_steps": 1}, {"every_s": 1e-6}])
def test_a_checkpoint_holds_what_the_run_was(when: dict[str, float], tmp_path: Path) -> None:
    planning = {"profile_repeats": 1, "profile_cache": False, "profile_first": True}
    config = run_config(steps=3, epochs=None, checkpoint={**when, "keep": 2}, planning=planning)
    outcome = run_replicas([config] * 2, [(9, 3), (2, 10)], tmp_path)
    assert_no_failure(outcome)
    assert [event.facts["saved_step"] for event in events(outcome, "checkpoint")] == [1, 2, 3]
    assert [found.step for found in checkpoints(tmp_path / "checkpoints")] == [2, 3]
    found = newest(tmp_path / "checkpoints")
    contents = found.verify()
    assert contents.progress.shares == (2, 10)
    assert contents.progress.generation == 1
    assert contents.progress.num_samples == 50
    plans = [Plan.from_json(json.dumps(plan)) for plan in json.loads(found.read("plans.json"))]
    assert [(plan.rank, plan.share) for plan in plans] == [(0, 2), (1, 10)]
    assert {profile.micro_batch for profile in read_profiles(tmp_path / "checkpoints")} >= {6}
    assert RunConfig.from_mapping(yaml.safe_load(found.read("config.yaml"))) == config


def test_a_run_whose_scoring_fails_has_saved_its_weights(tmp_path: Path) -> None:
    config = run_config(steps=3, epochs=None, data={"factory": "small_models:images_that_cannot_be_scored"})
    outcome = run_replicas([config], [(12,)], tmp_path)
    (failure,) = outcome.of_kind(FailureReport)
    assert "Target 5 is out of bounds" in str(failure.error)
    assert newest(tmp_path / "checkpoints").verify().progress.step == 3


@pytest.mark.slow
def test_the_last_state_is_saved_however_long_the_save_before_it_takes(tmp_path: Path) -> None:
    model = {"factory": "small_models:on_a_slow_disk", "kwargs": {"seconds": 1.0}}
    config = run_config(steps=3, epochs=None, model=model, checkpoint={"every_steps": 1})
    outcome = run_replicas([config] * 2, [(9, 3)], tmp_path)
    assert_no_failure(outcome)
    assert any("is being written" in event.detail for event in events(outcome, "checkpoint-failed"))
    assert newest(tmp_path / "checkpoints").step == 3

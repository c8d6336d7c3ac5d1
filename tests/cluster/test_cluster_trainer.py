"""Runs on a Ray cluster that is there already: what they write, tell and leave behind."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from runs import Watcher, settings

import revdist
from revdist.errors import (
    BatchTooSmall,
    BudgetTooSmall,
    ConfigError,
    DataMissing,
    FactoryError,
    NoFreeDevice,
    NonFiniteLoss,
    UsageError,
)
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder", "running_ray")


def fit(folder: Path, watcher: Watcher | None = None, **changes: Any) -> revdist.Result:
    return revdist.Trainer(settings(**changes), observer=watcher, run_dir=folder / "run").fit()


def all_cores_are_free(patience_s: float = 10.0) -> bool:
    """Whether the actors of a run are gone; Ray counts what they held as free a moment later."""
    until_s = time.monotonic() + patience_s
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > until_s:
            return False
        time.sleep(0.05)
    return True


def test_a_run_tells_and_writes_everything_and_leaves_ray_as_it_was(tmp_path: Path) -> None:
    watcher = Watcher()
    result = fit(tmp_path, watcher)
    assert ray.is_initialized()
    assert watcher.calls[0] == "start"
    assert watcher.calls[-1] == "end"
    assert [step["step"] for step in watcher.steps] == list(range(1, 11))
    assert sum(rank["share"] for rank in watcher.steps[-1]["ranks"]) == 10
    assert [sum(rank["samples"] for rank in step["ranks"]) for step in watcher.steps] == [10] * 10
    reader = RunReader(result.run_dir)
    assert list(reader.metrics()) == watcher.steps
    assert list(reader.events()) == watcher.events
    assert reader.summary() == result.metrics == watcher.summary
    assert sorted(plan["rank"] for plan in reader.plans() if plan["generation"] == 0 and plan["step"] == 0) == [0, 1]
    assert {plan.device for plan in result.plans} == {reading.uuid for reading in watcher.devices}
    assert result.metrics["steps"] == 10
    assert result.metrics["samples"] == 100
    assert set(result.metrics["gains"]) == {"over_all_invert", "over_equal_split", "basis"}
    assert [event["kind"] for event in watcher.events][-2:] == ["checkpoint", "end"]
    assert all_cores_are_free()


def test_memory_that_a_neighbour_takes_and_gives_back_is_met_live_without_losing_a_step(tmp_path: Path) -> None:
    watcher = Watcher()
    fit(
        tmp_path,
        watcher,
        model={"factory": "small_models:classifier", "kwargs": {"depth": 6}},
        data={"factory": "small_models:images", "kwargs": {"num_samples": 320, "size": 24}},
        global_batch=64,
        micro_batch=32,
        epochs=20,
        capacities=("64MiB", "12MiB"),
        co_tenants=[{"device": "cpu-1", "take": "5MiB", "from_step": 10, "to_step": 60}],
    )
    reasons = [plan.reason for plan in watcher.plans if plan.rank == 1]
    assert "memory-lost" in reasons
    assert "memory-gained" in reasons[reasons.index("memory-lost") :]
    assert [step["step"] for step in watcher.steps] == list(range(1, 101))
    for step in watcher.steps:
        assert all(rank["peak_bytes"] <= rank["predicted_peak_bytes"] * 1.02 for rank in step["ranks"])
    lost = next(plan for plan in watcher.plans if plan.reason == "memory-lost")
    before = next(plan for plan in watcher.plans if plan.reason == "profile" and plan.rank == lost.rank)
    assert lost.schedule.strip.count("I") > before.schedule.strip.count("I")


BAD: list[tuple[type[UsageError], dict[str, Any], str]] = [
    (FactoryError, {"model": {"factory": "no_such_package:model"}}, "no module 'no_such_package'"),
    (
        DataMissing,
        {"data": {"factory": "revdist.training.datasets:fashion_mnist", "kwargs": {"directory": "/no"}}},
        "apt",
    ),
    (BudgetTooSmall, {"capacities": ("64MiB", "20KiB")}, "cpu-1: .* missing"),
    (BatchTooSmall, {"global_batch": 1}, "2 replicas"),
    (NoFreeDevice, {"devices": [{"kind": "cuda"}]}, "no free GPU"),
    (NoFreeDevice, {"threads_per_worker": 99}, "no free core"),
    (ConfigError, {"co_tenants": [{"device": "cpu-7", "take": 1, "from_step": 0, "to_step": 1}]}, "cpu-7"),
    (ConfigError, {"modle": {}}, "did you mean 'model'"),
]


@pytest.mark.parametrize(
    ("error", "changes", "said"), BAD, ids=[f"{e.__name__}-{n}" for n, (e, _, _) in enumerate(BAD)]
)
def test_what_cannot_run_says_so_and_writes_nothing(
    error: type[UsageError], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said) as caught:
        fit(tmp_path, **changes)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_step_rank_and_samples(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"rank \d on .* failed: step 1: the loss of step 1 is nan") as caught:
        fit(tmp_path, optimizer={"kwargs": {"lr": 1e200}}, precision="fp64")
    assert caught.value.facts["samples"]
    assert "lower the learning rate" in caught.value.message
    assert list(RunReader(tmp_path / "run").events())[-1]["kind"] == "failed"


def test_a_run_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        fit(tmp_path)


@pytest.mark.parametrize("location", ["", pytest.param("local://{}/far/away", marks=pytest.mark.slow)])
def test_a_run_resumes_from_its_newest_checkpoint(location: str, tmp_path: Path) -> None:
    saved = {"location": location.format(tmp_path)}
    fit(tmp_path, steps=4, epochs=None, checkpoint=saved)
    watcher = Watcher()
    trainer = revdist.Trainer(
        settings(steps=7, epochs=None, checkpoint=saved), observer=watcher, run_dir=tmp_path / "run", resume=True
    )
    result = trainer.fit()
    place = saved["location"] or str(tmp_path / "run" / "checkpoints")
    told = [event["detail"] for event in watcher.events if event["kind"] in ("resumed", "checkpoint")]
    assert told[0].startswith(f"{place}/step-000000004, written by ")
    assert told[1] == f"{place}/step-000000007"
    assert [step["step"] for step in watcher.steps] == [5, 6, 7]
    assert result.metrics["samples"] == 70
    assert len(list(RunReader(result.run_dir).metrics())) == 7


@pytest.mark.slow
def test_a_run_lost_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    fit(tmp_path, steps=4, epochs=None)
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir / "checkpoints")
    begun = [event for event in RunReader(run_dir).events() if event["kind"] == "start"]
    (run_dir / "events.jsonl").write_text(json.dumps(begun[0]) + "\n")
    watcher = Watcher()
    revdist.Trainer(settings(steps=5, epochs=None), observer=watcher, run_dir=run_dir, resume=True).fit()
    (start,) = [event for event in watcher.events if event["kind"] == "start"]
    assert start["detail"].endswith(
        "begins again, since there is no checkpoint yet, 4 steps that were not saved are taken again"
    )
    assert [step["step"] for step in RunReader(run_dir).metrics()] == [1, 2, 3, 4, 5]
    assert list(RunReader(run_dir).metrics()) == watcher.steps


def test_a_dry_run_names_the_devices_and_writes_nothing(tmp_path: Path) -> None:
    readings = revdist.Trainer(settings(), run_dir=tmp_path / "run").dry_run()
    assert [reading.name for reading in readings] == ["cpu-0", "cpu-1"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(FactoryError):
        revdist.Trainer(settings(loss="torch:no_such_loss")).dry_run()

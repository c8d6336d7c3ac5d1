"""A run goes on with the ranks that are left: no step is lost, and the weights are those of an unharmed run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from harm import SLOW, Harm, assert_nothing_was_lost, final_state, is_dead, run, signals, wait_until
from ray.exceptions import OutOfMemoryError, RayActorError

from revdist.errors import RunFailed
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder", "running_ray")

STEPS = 60
Unharmed = Callable[[int], dict[str, Any]]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(("cpu-1",), marks=pytest.mark.slow),
        ("cpu-0",),
        pytest.param(("cpu-0", "cpu-2"), marks=pytest.mark.slow),
    ],
    ids=["a worker", "rank 0, which hosts the store and reports", "two at once"],
)
def test_killed_ranks_lose_no_step(devices: tuple[str, ...], unharmed: Unharmed, tmp_path: Path) -> None:
    harm = Harm(10, signals(*devices))
    result = run(tmp_path / "run", harm, epochs=None, steps=STEPS, data=SLOW, workers={"max_restarts": 0})
    assert len(harm.pids) == len(devices)
    assert all(is_dead(pid) for pid in harm.pids)
    assert harm.groups[-1] == [f"cpu-{number}" for number in range(3) if f"cpu-{number}" not in devices]
    assert [str(pid) in event["detail"] for event, pid in zip(harm.kinds("lost"), harm.pids, strict=True)]
    assert len(harm.steps[-1]["ranks"]) == 3 - len(devices)
    assert_nothing_was_lost(harm, result, unharmed(STEPS), steps=STEPS)


@pytest.mark.slow
def test_one_that_ray_s_memory_monitor_kills_is_lost_as_any_other(
    unharmed: Unharmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray then says OutOfMemoryError in place of ActorDiedError, also of calls that come later."""
    get = ray.get

    def get_without_memory(*arguments: Any, **options: Any) -> Any:
        try:
            return get(*arguments, **options)
        except RayActorError as error:
            raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.") from error

    monkeypatch.setattr(ray, "get", get_without_memory)
    harm = Harm(10, signals("cpu-1"))
    result = run(tmp_path / "run", harm, epochs=None, steps=STEPS, data=SLOW, workers={"max_restarts": 0})
    (lost,) = harm.kinds("lost")
    assert "killed by Ray's memory monitor" in lost["detail"]
    assert_nothing_was_lost(harm, result, unharmed(STEPS), steps=STEPS)


@pytest.mark.slow
def test_a_co_tenant_of_a_lost_rank_s_device_is_done_without(unharmed: Unharmed, tmp_path: Path) -> None:
    harm = Harm(10, signals("cpu-1"))
    co_tenant = {"device": "cpu-1", "take": "1MiB", "from_step": 20, "to_step": 40}
    workers = {"max_restarts": 0}
    result = run(tmp_path / "run", harm, epochs=None, steps=STEPS, data=SLOW, workers=workers, co_tenants=[co_tenant])
    assert len(harm.kinds("lost")) == 1
    assert not [event for event in harm.kinds("co-tenant") if "takes" in event["detail"]]
    assert_nothing_was_lost(harm, result, unharmed(STEPS), steps=STEPS)


def test_a_frozen_rank_is_given_up_and_ended(unharmed: Unharmed, tmp_path: Path) -> None:
    harm = Harm(10, signals("cpu-1", number=signal.SIGSTOP))
    faults, workers = {"heartbeat_s": 2}, {"max_restarts": 0}
    result = run(tmp_path / "run", harm, epochs=None, steps=STEPS, data=SLOW, workers=workers, faults=faults)
    (lost,) = harm.kinds("lost")
    assert "did not answer for 2.0 s" in lost["detail"]
    wait_until(lambda: is_dead(harm.pids[0]), "the frozen replica is there")
    assert_nothing_was_lost(harm, result, unharmed(STEPS), steps=STEPS)


@pytest.mark.slow
def test_the_state_is_saved_though_the_rank_that_writes_it_is_killed(unharmed: Unharmed, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    harm = Harm(STEPS, lambda harm: watcher.start())

    def kill_the_writer() -> None:
        wait_until(lambda: any((run_dir / "checkpoints").glob("*.part/*")), "nothing is being written")
        harm.signal(["cpu-0"], signal.SIGKILL)

    watcher = threading.Thread(target=kill_the_writer)
    model = {"factory": "small_models:on_a_slow_disk", "kwargs": {"seconds": 2.0}}
    result = run(run_dir, harm, epochs=None, steps=STEPS, model=model, workers={"max_restarts": 0})
    watcher.join()
    assert all(is_dead(pid) for pid in harm.pids)
    assert len(harm.pids) == len(harm.kinds("lost")) == 1
    assert_nothing_was_lost(harm, result, unharmed(STEPS), steps=STEPS)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_lost_rank_is_replaced_at_a_step_boundary(unharmed: Unharmed, tmp_path: Path) -> None:
    steps = 1500
    harm = Harm(20, signals("cpu-1"))
    result = run(tmp_path / "run", harm, epochs=None, steps=steps, data=SLOW)
    assert harm.groups == [["cpu-0", "cpu-2"], ["cpu-0", "cpu-2", "cpu-1"]]
    (joined,) = harm.kinds("joined")
    assert "cpu-1" in joined["detail"]
    assert len(harm.steps[-1]["ranks"]) == 3
    assert_nothing_was_lost(harm, result, unharmed(steps), steps=steps)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ranks_lost_together_come_back_together(unharmed: Unharmed, tmp_path: Path) -> None:
    """Each newcomer waits for the other before it is ready to join."""
    steps = 1500
    harm = Harm(20, signals("cpu-1", "cpu-2"))
    kwargs = {"folder": str(tmp_path), "first": 3, "then": 2}
    model = {"factory": "small_models:classifier_built_together", "kwargs": kwargs}
    result = run(tmp_path / "run", harm, epochs=None, steps=steps, data=SLOW, model=model)
    assert sorted(harm.groups[-1]) == ["cpu-0", "cpu-1", "cpu-2"]
    assert len(harm.kinds("joined")) == 2
    assert_nothing_was_lost(harm, result, unharmed(steps), steps=steps)


def trouble_at_a_join(trouble: str, folder: Path) -> dict[str, Any]:
    """A run in which joining goes wrong. trouble, folder: as `small_models.classifier_with_trouble_at_a_join`."""
    kwargs = {"trouble": trouble, "folder": str(folder)}
    return {
        "epochs": None,
        "model": {"factory": "small_models:classifier_with_trouble_at_a_join", "kwargs": kwargs},
        "data": SLOW,
        "faults": {"heartbeat_s": 1},
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("trouble", ["death", "failure"])
def test_a_join_that_goes_wrong_while_it_is_prepared_costs_nothing(
    trouble: str, unharmed: Unharmed, tmp_path: Path
) -> None:
    """A newcomer is killed, or a rank cannot connect: training goes on, and another group is formed."""
    steps = 1500
    harm = Harm(20, signals("cpu-1"))
    result = run(tmp_path / "run", harm, steps=steps, **trouble_at_a_join(trouble, tmp_path))
    assert (tmp_path / trouble).exists()
    assert harm.groups[-1] == ["cpu-0", "cpu-2", "cpu-1"]
    assert len(harm.kinds("lost")) == (2 if trouble == "death" else 1)
    assert_nothing_was_lost(harm, result, unharmed(steps), steps=steps)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_newcomer_that_never_connects_is_let_go_while_the_others_train(unharmed: Unharmed, tmp_path: Path) -> None:
    steps = 1500
    harm = Harm(20, signals("cpu-1"))
    values = trouble_at_a_join("deaf", tmp_path) | {"workers": {"max_restarts": 1}}
    result = run(tmp_path / "run", harm, steps=steps, **values)
    assert (tmp_path / "deaf").read_text() == "xx"
    assert harm.groups == [["cpu-0", "cpu-2"]] * 2
    assert "did not join: it could not be connected to the others in 2 tries" in harm.kinds("lost")[1]["detail"]
    after_the_loss, after_the_tries = [event["step"] for event in harm.kinds("regroup")]
    assert after_the_tries > after_the_loss + 50  # about three seconds a try, in which the others trained
    assert_nothing_was_lost(harm, result, unharmed(steps), steps=steps)


@pytest.mark.slow
def test_a_broken_connection_between_living_ranks_is_mended(unharmed: Unharmed, tmp_path: Path) -> None:
    """Nobody is lost and the shares stay: the result is the same to the bit."""
    common = {"epochs": None, "steps": 30, "planning": {"share": "equal", "profile_cache": False}}
    harm = Harm(30, lambda harm: None)
    result = run(
        tmp_path / "run",
        harm,
        model={"factory": "small_models:classifier_that_loses_its_connections", "kwargs": {"rank": 1, "at": 12}},
        faults={"heartbeat_s": 1},
        **common,
    )
    assert harm.groups == [["cpu-0", "cpu-1", "cpu-2"]]
    assert not harm.kinds("lost")
    assert_nothing_was_lost(harm, result, unharmed(30), steps=30)
    whole = run(tmp_path / "whole", Harm(0, lambda harm: None), **common)
    for name, tensor in final_state(whole.run_dir).items():
        assert tensor.equal(final_state(result.run_dir)[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_whose_end_one_rank_missed_is_taken_and_reported_once(
    rank: int, unharmed: Unharmed, tmp_path: Path
) -> None:
    """Also by the first rank, which reports what all take."""
    common = {"epochs": None, "steps": 30, "planning": {"share": "equal", "profile_cache": False}}
    harm = Harm(30, lambda harm: None)
    model = {"factory": "small_models:classifier_that_misses_the_end_of_a_step", "kwargs": {"rank": rank, "step": 12}}
    result = run(tmp_path / "run", harm, model=model, faults={"heartbeat_s": 1}, **common)
    assert harm.groups == [["cpu-0", "cpu-1", "cpu-2"]]
    assert not harm.kinds("lost")
    assert_nothing_was_lost(harm, result, unharmed(30), steps=30)


@pytest.mark.slow
def test_a_device_that_falls_off_the_bus_takes_its_rank_along(unharmed: Unharmed, tmp_path: Path) -> None:
    harm = Harm(STEPS, lambda harm: None)
    data = {"factory": "small_models:images_on_a_device_that_goes", "kwargs": {"rank": 2, "after_s": 0.2}}
    steps = 400
    result = run(tmp_path / "run", harm, epochs=None, steps=steps, data=data, workers={"max_restarts": 0})
    assert harm.groups == [["cpu-0", "cpu-1"]]
    assert any("Xid 79" in event["detail"] for event in harm.kinds("lost"))
    assert_nothing_was_lost(harm, result, unharmed(steps), steps=steps)


def test_too_few_ranks_end_the_run_and_the_first_that_failed_is_named(tmp_path: Path) -> None:
    harm = Harm(5, signals("cpu-1"))
    with pytest.raises(RunFailed, match=r"rank 1 on .*cpu-1, process \d+\) failed: its process was killed") as caught:
        run(tmp_path / "run", harm, epochs=200, workers={"min": 3})
    assert str(harm.pids[0]) in caught.value.message
    assert caught.value.facts["rank"] == 1
    assert caught.value.facts["remedy"]
    assert is_dead(harm.pids[0])
    last = list(RunReader(tmp_path / "run").events())[-1]
    assert (last["kind"], last["rank"]) == ("failed", 1)


@pytest.mark.slow
def test_the_wall_clock_may_jump(unharmed: Unharmed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time

    def jump(harm: Harm) -> None:
        monkeypatch.setattr(time, "time", lambda: real() + 86_400)

    harm = Harm(10, jump)
    result = run(tmp_path / "run", harm, epochs=None, steps=STEPS)
    assert harm.done
    assert not harm.groups
    assert not harm.kinds("lost")
    assert_nothing_was_lost(harm, result, unharmed(STEPS), steps=STEPS)
    assert os.getpid() not in harm.pids

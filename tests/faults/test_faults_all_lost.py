"""All replicas are lost at once: the supervisor starts them again from the last checkpoint, by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harm import BOUND, SLOW, Harm, final_state, holder, is_dead, launch, run, signals, wait_for_steps, wait_until
from runs import Watcher, settings

import revdist
from revdist.errors import RunFailed
from revdist.training.checkpoint_files import checkpoints
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder", "running_ray")

STEPS = 60
ALL = ("cpu-0", "cpu-1", "cpu-2")
Unharmed = Callable[[int], dict[str, Any]]


def kill_all(harm: Harm) -> None:
    """As soon as there is a checkpoint; replicas go on meanwhile."""
    assert harm.run_dir is not None
    folder = harm.run_dir / "checkpoints"
    wait_until(lambda: bool(checkpoints(folder)), "no checkpoint")
    harm.signal(ALL, signal.SIGKILL)


def assert_all_was_done_again(run_dir: Path, pids: list[int], unharmed: dict[str, torch.Tensor], steps: int) -> None:
    """The replicas are dead, and the run directory holds the run to which nothing happened."""
    reader = RunReader(run_dir)
    assert all(is_dead(pid) for pid in pids)
    told = [event["detail"] for event in reader.events() if event["kind"] == "lost"]
    assert all(any(f"process {pid})" in detail for detail in told) for pid in pids), told
    metrics = list(reader.metrics())
    assert [step["step"] for step in metrics] == list(range(1, steps + 1))
    assert all(sum(rank["share"] for rank in step["ranks"]) == 10 for step in metrics)
    summary = reader.summary()
    assert summary is not None
    assert summary["replicas_identical"]
    final = final_state(run_dir)
    assert final.keys() == unharmed.keys()
    for name, tensor in unharmed.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=BOUND, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_all_killed_at_once_start_again_from_the_last_checkpoint(unharmed: Unharmed, tmp_path: Path) -> None:
    harm = Harm(20, kill_all)
    run(tmp_path / "run", harm, epochs=None, steps=STEPS, data=SLOW, checkpoint={"every_steps": 8})
    assert len(harm.pids) == 3
    (again,) = harm.kinds("restart")
    assert "restart 1 of 3" in again["detail"]
    first, second = harm.kinds("start")
    saved = second["step"]
    assert f"from step-{saved:09d}" in again["detail"]
    assert (first["step"], saved % 8) == (0, 0)
    assert 0 < saved <= again["step"]
    assert harm.groups[-1] == list(ALL)
    assert [step["step"] for step in harm.steps].count(saved + 1) == (2 if again["step"] > saved else 1)
    assert_all_was_done_again(tmp_path / "run", harm.pids, unharmed(STEPS), STEPS)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_without_a_checkpoint_a_run_that_began_from_nothing_does_so_again(unharmed: Unharmed, tmp_path: Path) -> None:
    """All of them are wanted, so the first that is lost must not end the run while the others are not heard of."""
    harm = Harm(10, signals(*ALL))
    run(tmp_path / "run", harm, epochs=None, steps=STEPS, data=SLOW, workers={"min": 3, "max_restarts": 1})
    (again,) = harm.kinds("restart")
    assert "from the beginning, since there is no checkpoint yet, restart 1 of 1" in again["detail"]
    assert [event["step"] for event in harm.kinds("start")] == [0, 0]
    assert_all_was_done_again(tmp_path / "run", harm.pids, unharmed(STEPS), STEPS)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_that_went_on_from_a_checkpoint_which_is_gone_does_not_begin_from_nothing(tmp_path: Path) -> None:
    values = settings(capacities=("64MiB",) * 3, epochs=None, steps=5)
    revdist.Trainer(values, observer=Watcher(), run_dir=tmp_path / "run").fit()

    def remove_and_kill(harm: Harm) -> None:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        harm.signal(ALL, signal.SIGKILL)

    harm = Harm(10, remove_and_kill)
    with pytest.raises(RunFailed, match="its process was killed"):
        revdist.Trainer({**values, "steps": 5000}, observer=harm, run_dir=tmp_path / "run", resume=True).fit()
    assert harm.done
    assert not harm.kinds("restart")
    steps = [step["step"] for step in RunReader(tmp_path / "run").metrics()]
    assert steps == list(range(1, steps[-1] + 1))
    assert steps[-1] >= 10


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_restarts_that_are_used_up_end_the_run(tmp_path: Path) -> None:
    harm = Harm(5, signals(*ALL))
    with pytest.raises(RunFailed, match="its process was killed"):
        run(tmp_path / "run", harm, epochs=200, workers={"max_restarts": 0})
    assert not harm.kinds("restart")
    assert [event["kind"] for event in RunReader(tmp_path / "run").events()][-1] == "failed"


def dying_while_it_loads(dead: Path, *, times: int, by: str = "SIGKILL") -> dict[str, Any]:
    """A run that may start again once; so many processes of rank 1 die before the first step. dead: gets their pids."""
    dead.mkdir()
    kwargs = {"rank": 1, "times": times, "folder": str(dead), "by": by}
    model = {"factory": "small_models:classifier_whose_maker_dies", "kwargs": kwargs}
    return {"epochs": None, "steps": STEPS, "model": model, "workers": {"max_restarts": 1}}


def assert_started_again_once(watcher: Watcher) -> None:
    (again,) = [event["detail"] for event in watcher.events if event["kind"] == "restart"]
    assert again.startswith("a replica was lost before the first step: all start again from the beginning"), again


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("by", ["SIGKILL", "SIGSTOP"])
def test_a_replica_that_is_lost_before_the_first_step_lets_all_start_again(
    by: str, unharmed: Unharmed, tmp_path: Path
) -> None:
    """It is killed, or freezes: its host may be well, and Ray content."""
    watcher, dead = Watcher(), tmp_path / "dead"
    run(tmp_path / "run", watcher, **dying_while_it_loads(dead, times=1, by=by))
    (pid,) = [int(path.name) for path in dead.iterdir()]
    assert_started_again_once(watcher)
    assert [event["kind"] for event in watcher.events].count("start") == 1
    assert_all_was_done_again(tmp_path / "run", [pid], unharmed(STEPS), STEPS)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_that_is_lost_before_the_first_step_each_time_ends_the_run(tmp_path: Path) -> None:
    watcher, dead = Watcher(), tmp_path / "dead"
    with pytest.raises(RunFailed, match=r"rank 1 .* its process was killed"):
        run(tmp_path / "run", watcher, **dying_while_it_loads(dead, times=2))
    assert len(list(dead.iterdir())) == 2
    assert_started_again_once(watcher)
    assert [event["kind"] for event in watcher.events].count("start") == 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_launch_says_so_and_ends_well_after_two_such_losses(unharmed: Unharmed, tmp_path: Path) -> None:
    """The second one strikes replicas that are still starting."""
    config, run_dir = tmp_path / "small.yaml", tmp_path / "run"
    slow = {"factory": "small_models:slow_images", "kwargs": {"seconds": 0.05}}
    values = settings(capacities=("64MiB",) * 3, precision="fp64", tensorboard=False, data=slow, epochs=None)
    config.write_text(json.dumps({**values, "steps": STEPS, "checkpoint": {"every_steps": 5}}))
    process = launch(config, run_dir)
    wait_for_steps(run_dir, 10, process)
    wait_until(lambda: bool(checkpoints(run_dir / "checkpoints")), "no checkpoint")
    killed = [holder(device) for device in ALL]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)

    def started() -> bool:
        return (found := holder_or_none("cpu-1")) is not None and found not in killed

    wait_until(started, "no replica started again", 60)
    another = holder("cpu-1")
    os.kill(another, signal.SIGKILL)
    output = process.communicate(timeout=150)[0].decode()
    assert process.returncode == 0, output
    again = [event["detail"] for event in RunReader(run_dir).events() if event["kind"] == "restart"]
    assert ["restart 1 of 3" in again[0], "restart 2 of 3" in again[-1]] == [True, True], again
    assert "restart: no replica is left: all start again from step-" in " ".join(output.split()), output
    assert_all_was_done_again(run_dir, [*killed, another], unharmed(STEPS), STEPS)


def holder_or_none(device: str) -> int | None:
    try:
        return holder(device)
    except (StopIteration, ValueError):
        return None

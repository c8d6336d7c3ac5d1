"""A detached run's replicas train on without their driver, and the next one finds them where they are."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from harm import BOUND, SLOW, final_state, holder, is_dead, launch, wait_until
from runs import settings

from revdist.cluster.local import addresses
from revdist.cluster.processes import started_with
from revdist.cluster.run_record import RUN_ID
from revdist.cluster.stopping import stop_run
from revdist.devices import list_devices
from revdist.training.checkpoint_files import checkpoints, newest_whole
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")

STEPS = 350
PATIENCE_S = 90.0


@pytest.fixture
def detached(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Starts a detached run and returns its directory; ended with the test."""
    started: list[Path] = []

    def start(*more: str, **environment: str) -> Path:
        config, run_dir = tmp_path / "small.yaml", tmp_path / "run"
        config.write_text(
            json.dumps(settings(data=SLOW, epochs=None, steps=STEPS, precision="fp64", tensorboard=False))
        )
        started.append(run_dir)
        launch_and_wait(config, run_dir, "--detach", *more, **environment)
        return run_dir

    yield start
    for run_dir in started:
        if (run_dir / "run.json").exists():
            for pid in pids(run_dir):
                if not is_dead(pid):
                    os.kill(pid, signal.SIGKILL)
            stop_run(run_dir, now=True, timeout_s=10)


def launch_and_wait(config: Path, run_dir: Path, *more: str, **environment: str) -> None:
    """Launch, and wait for the command to come back."""
    process = launch(config, run_dir, *more, **environment)
    try:
        output = process.communicate(timeout=PATIENCE_S)[0].decode()
    finally:
        process.kill()  # does nothing to one that has ended
    assert process.returncode == 0, output


def record(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return values


def pids(run_dir: Path) -> list[int]:
    """Of the driver and of its watchman."""
    driver = record(run_dir)["process"]["pid"]
    watchmen = [int(f.name) for f in Path("/proc").iterdir() if f.name.isdigit() and is_watchman(f, run_dir)]
    return [*watchmen, driver]


def is_watchman(folder: Path, run_dir: Path) -> bool:
    try:
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"revdist.cluster.watchman" in words and str(run_dir).encode() in words


def steps(run_dir: Path) -> list[int]:
    return [step["step"] for step in RunReader(run_dir).metrics()]


def assert_unharmed(run_dir: Path, state: dict[str, Any]) -> None:
    assert steps(run_dir) == list(range(1, STEPS + 1))
    final = final_state(run_dir)
    for name, tensor in state.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=BOUND, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_killed_driver_is_started_anew_and_misses_nothing(
    detached: Callable[..., Path], unharmed: Callable[[int], dict[str, Any]]
) -> None:
    run_dir = detached()
    driver = record(run_dir)["process"]["pid"]
    replicas = [holder("cpu-0"), holder("cpu-1")]
    os.kill(driver, signal.SIGKILL)
    wait_until(lambda: record(run_dir)["process"]["pid"] != driver, "no other driver", PATIENCE_S)
    wait_until(lambda: record(run_dir)["state"] == "done", "the run did not end", PATIENCE_S)
    assert [event["kind"] for event in RunReader(run_dir).events()].count("supervisor") == 1
    assert all(is_dead(pid) for pid in replicas)
    assert_unharmed(run_dir, unharmed(STEPS))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("running_ray")
def test_resume_finds_replicas_that_nobody_supervises(
    detached: Callable[..., Path], unharmed: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    address = f"--address={addresses().head}"
    run_dir = detached(address)
    replicas = [holder("cpu-0"), holder("cpu-1")]
    for pid in pids(run_dir):
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    assert not any(is_dead(pid) for pid in replicas)
    launch_and_wait(tmp_path / "small.yaml", run_dir, "--resume", address)
    assert not checkpoints(run_dir / "checkpoints")[:-1]  # it went on from memory, not from disk
    assert_unharmed(run_dir, unharmed(STEPS))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("running_ray")
def test_a_run_of_which_nothing_is_left_before_its_first_checkpoint_begins_again(
    detached: Callable[..., Path], tmp_path: Path
) -> None:
    address = f"--address={addresses().head}"
    run_dir = detached(address)
    for pid in [*pids(run_dir), holder("cpu-0"), holder("cpu-1")]:
        os.kill(pid, signal.SIGKILL)
    launch_and_wait(tmp_path / "small.yaml", run_dir, "steps=20", "--resume", address)
    starts = [event["detail"] for event in RunReader(run_dir).events() if event["kind"] == "start"]
    assert len(starts) == 2
    assert "begins again, since there is no checkpoint yet" in starts[1]
    assert steps(run_dir) == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("running_ray")
def test_resume_in_the_background_finds_them_too_and_comes_back(detached: Callable[..., Path], tmp_path: Path) -> None:
    address = f"--address={addresses().head}"
    run_dir = detached(address)
    replicas = [holder("cpu-0"), holder("cpu-1")]
    for pid in pids(run_dir):
        os.kill(pid, signal.SIGKILL)
    launch_and_wait(tmp_path / "small.yaml", run_dir, "--resume", "--detach", address)
    assert record(run_dir)["state"] == "running"
    assert not any(is_dead(pid) for pid in replicas)
    watchman, driver = pids(run_dir)
    assert {watchman, driver} <= {one.pid for one in started_with(RUN_ID, record(run_dir)["run_id"])}
    stop_run(run_dir, now=True, timeout_s=10)
    wait_until(lambda: all(is_dead(pid) for pid in (watchman, driver, *replicas)), "something stayed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_supervisor_that_takes_over_allows_no_more_restarts_than_the_one_before(
    detached: Callable[..., Path],
) -> None:
    run_dir = detached("steps=20000", "workers.max_restarts=1")

    def details(kind: str) -> list[str]:
        return [event["detail"] for event in RunReader(run_dir).events() if event["kind"] == kind]

    os.kill(holder("cpu-1"), signal.SIGKILL)
    wait_until(lambda: record(run_dir)["restarts"] == 1, "it was not replaced", PATIENCE_S)
    assert len(details("joined")) == 1
    os.kill(record(run_dir)["process"]["pid"], signal.SIGKILL)
    wait_until(lambda: bool(details("supervisor")), "no other driver", PATIENCE_S)
    os.kill(holder("cpu-1"), signal.SIGKILL)
    wait_until(lambda: len(details("lost")) == 2, "nobody missed it", PATIENCE_S)
    assert "it is not replaced: see workers.max_restarts" in details("lost")[-1]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("running_ray")
def test_replicas_that_nobody_comes_back_to_save_and_leave(detached: Callable[..., Path]) -> None:
    run_dir = detached(f"--address={addresses().head}", REVDIST_ORPHAN_S="12")
    replicas = [holder("cpu-0"), holder("cpu-1")]
    for pid in pids(run_dir):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(is_dead(pid) for pid in replicas), "replicas stayed", PATIENCE_S)
    assert checkpoints(run_dir / "checkpoints")
    assert not [one for reading in list_devices() for one in reading.holders]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_whose_clusters_raylet_is_lost_saves_and_leaves(detached: Callable[..., Path]) -> None:
    run_dir = detached()
    replicas = [holder("cpu-0"), holder("cpu-1")]
    watchman, _ = pids(run_dir)
    (raylet,) = [one for one in psutil.Process(watchman).children(recursive=True) if one.name() == "raylet"]
    raylet.kill()
    wait_until(lambda: record(run_dir)["ended_s"] is not None, "the run did not end", PATIENCE_S)
    assert (record(run_dir)["state"], record(run_dir)["exit_code"]) == ("stopped", 143)
    assert "the loss of this host's raylet" in " ".join(record(run_dir)["error"])
    assert steps(run_dir) == list(range(1, len(steps(run_dir)) + 1))
    assert newest_whole(run_dir / "checkpoints").checkpoint.step == len(steps(run_dir))
    wait_until(lambda: all(is_dead(pid) for pid in (*replicas, watchman)), "something stayed")

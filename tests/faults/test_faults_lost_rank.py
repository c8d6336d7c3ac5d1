"""A run that loses a rank, or is told to leave, says so and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs import Watcher, settings

import revdist
from revdist.cluster.local import ray_cluster
from revdist.devices import list_devices
from revdist.errors import RunFailed
from revdist.training.checkpoint_files import checkpoints
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")


@pytest.fixture
def running_ray() -> Iterator[None]:
    with ray_cluster(None, num_workers=2):
        yield


def holder(device: str) -> int:
    """Pid of the replica on a CPU device."""
    (reading,) = [reading for reading in list_devices() if reading.name == device]
    return reading.holders[0].pid


def is_dead(pid: int) -> bool:
    """Whether a process runs no more; one that its parent has not collected yet still has its number."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.usefixtures("running_ray")
def test_a_killed_rank_is_named_with_host_cause_and_remedy(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(step: int) -> None:
        if step == 5:
            killed.append(holder("cpu-1"))
            os.kill(killed[0], signal.SIGKILL)

    watcher = Watcher(kill)
    survivor_and_victim = settings(epochs=200)
    with pytest.raises(RunFailed, match=r"rank 1 on .*cpu-1, process \d+\) failed: its process was killed") as caught:
        revdist.Trainer(survivor_and_victim, observer=watcher, run_dir=tmp_path / "run").fit()
    assert killed
    assert str(killed[0]) in caught.value.message
    assert caught.value.facts["rank"] == 1
    assert caught.value.facts["remedy"]
    assert is_dead(killed[0])
    last = list(RunReader(tmp_path / "run").events())[-1]
    assert (last["kind"], last["rank"]) == ("failed", 1)


def launch(config: Path, run_dir: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "revdist.cli", "launch", str(config), "--run-dir", str(run_dir), *more]
    path = os.pathsep.join([str(Path(__file__).parent.parent / "training"), str(Path(revdist.__file__).parent.parent)])
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_steps(run_dir: Path, count: int, process: subprocess.Popen[bytes], patience_s: float = 80) -> None:
    until_s = time.monotonic() + patience_s
    while not (run_dir / "metrics.jsonl").exists() or len(list(RunReader(run_dir).metrics())) < count:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < until_s, "no step in time"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_leaves_nothing_running_and_can_be_resumed(
    number: signal.Signals, exit_code: int, tmp_path: Path
) -> None:
    config, run_dir = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(json.dumps(settings(epochs=400)))
    process = launch(config, run_dir)
    wait_for_steps(run_dir, 3, process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output = process.communicate(timeout=100)[0].decode()
    assert process.returncode == exit_code, output
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    steps = [step["step"] for step in RunReader(run_dir).metrics()]
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == [f"step-{steps[-1]:09d}"]
    config.write_text(json.dumps(settings(epochs=None, steps=steps[-1] + 2)))
    again = launch(config, run_dir, "--resume")
    output = again.communicate(timeout=100)[0].decode()
    assert again.returncode == 0, output
    assert [step["step"] for step in RunReader(run_dir).metrics()] == list(range(1, steps[-1] + 3))

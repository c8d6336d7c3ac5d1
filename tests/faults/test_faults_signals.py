"""A run that is told to leave saves, ends everything that it started, and can be taken up again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
from harm import is_dead, launch, wait_for_steps, wait_until
from runs import settings

from revdist.training.checkpoint_files import checkpoints
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")


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
    wait_until(lambda: all(is_dead(child.pid) for child in below), f"not all of {below} ended", 10)
    steps = [step["step"] for step in RunReader(run_dir).metrics()]
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == [f"step-{steps[-1]:09d}"]
    config.write_text(json.dumps(settings(epochs=None, steps=steps[-1] + 2)))
    again = launch(config, run_dir, "--resume")
    output = again.communicate(timeout=100)[0].decode()
    assert again.returncode == 0, output
    assert [step["step"] for step in RunReader(run_dir).metrics()] == list(range(1, steps[-1] + 3))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_signal_ends_a_start_that_a_frozen_replica_holds_up(tmp_path: Path) -> None:
    config, run_dir = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(json.dumps(settings()))
    process = launch(config, run_dir)
    driver = psutil.Process(process.pid)
    frozen: list[psutil.Process] = []

    def has_frozen() -> bool:
        assert process.poll() is None, process.communicate()[0].decode()
        frozen.extend(child for child in driver.children(recursive=True) if is_a_replica(child))
        for child in frozen:
            child.suspend()
        return bool(frozen)

    below: list[psutil.Process] = []
    try:
        wait_until(has_frozen, "no replica in time", 60)
        below = driver.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0].decode()
        assert process.returncode == 143, output
        assert "stopped by SIGTERM before the first step: no checkpoint was written" in output
        wait_until(lambda: all(is_dead(child.pid) for child in below), f"not all of {below} ended", 10)
    finally:
        for one in [driver, *below, *frozen]:
            if not is_dead(one.pid):
                one.kill()


def is_a_replica(process: psutil.Process) -> bool:
    try:
        return "ReplicaActor" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False

"""Sixteen replicas on one machine, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from harm import holder, is_dead, launch, wait_for_steps, wait_until
from runs import settings

from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifteen_of_sixteen_go_on(tmp_path: Path) -> None:
    config, run_dir, steps = tmp_path / "small.yaml", tmp_path / "run", 40
    values = settings(
        capacities=["32MiB"] * 16,
        global_batch=32,
        epochs=None,
        steps=steps,
        tensorboard=False,
        data={"factory": "small_models:slow_images", "kwargs": {"seconds": 0.05}},
        workers={"max_restarts": 0},
        faults={"heartbeat_s": 30},
    )
    config.write_text(json.dumps(values))
    process = launch(config, run_dir)
    try:
        wait_for_steps(run_dir, 5, process, patience_s=300)
        victim = holder("cpu-7")
        os.kill(victim, signal.SIGKILL)
        output = process.communicate(timeout=200)[0].decode()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
    assert process.returncode == 0, output
    metrics = list(RunReader(run_dir).metrics())
    assert [step["step"] for step in metrics] == list(range(1, steps + 1))
    assert [len(metrics[0]["ranks"]), len(metrics[-1]["ranks"])] == [16, 15]
    assert {sum(rank["share"] for rank in step["ranks"]) for step in metrics} == {32}
    summary = RunReader(run_dir).summary()
    assert summary is not None
    assert summary["replicas_identical"]
    wait_until(lambda: is_dead(victim), "the killed replica is there")

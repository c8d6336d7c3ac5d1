"""Runs to which something happens, and what must be true of them afterwards: nothing was lost.

The runs compute in fp64 without batch statistics, so that other shares change weights by rounding alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from runs import Watcher, settings

import revdist
from revdist.cluster.trainer import Result
from revdist.devices import list_devices
from revdist.training.checkpoint import read_state
from revdist.training.checkpoint_files import newest
from revdist.training.run_directory import RunReader

BOUND = 1e-9
"""Largest difference of a weight in fp64 where shares changed on the way: sums in another order."""
SLOW = {"factory": "small_models:slow_images", "kwargs": {"seconds": 0.02}}
"""The same samples, at a pace at which a run is still under way when something happens to it."""
THREE = ("64MiB", "64MiB", "64MiB")


def holder(device: str) -> int:
    """Pid of the replica on a CPU device."""
    (reading,) = [reading for reading in list_devices() if reading.name == device]
    return next(one.pid for one in reading.holders if one.name.startswith("revdist"))


def is_dead(pid: int) -> bool:
    """Whether a process runs no more; one that its parent has not collected yet still has its number."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(done: Callable[[], bool], what: str, patience_s: float = 20) -> None:
    """Wait until it is done; fails, saying `what` is wrong, where that takes too long."""
    until_s = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < until_s, what
        time.sleep(0.05)


def launch(config: Path, run_dir: Path, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    """`revdist launch` as a process of its own, where the small models can be imported."""
    command = [sys.executable, "-m", "revdist.cli", "launch", str(config), "--run-dir", str(run_dir), *more]
    path = os.pathsep.join([str(Path(__file__).parent.parent / "training"), str(Path(revdist.__file__).parent.parent)])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_steps(run_dir: Path, count: int, process: subprocess.Popen[bytes], patience_s: float = 80) -> None:
    """Wait until a launched run has taken so many steps."""

    def taken() -> bool:
        assert process.poll() is None, process.communicate()[0].decode()
        return (run_dir / "metrics.jsonl").exists() and len(list(RunReader(run_dir).metrics())) >= count

    wait_until(taken, "no step in time", patience_s)


class Harm(Watcher):
    """Does something once, after a step, and remembers which processes it was done to."""

    def __init__(self, after: int, act: Callable[[Harm], None]) -> None:
        super().__init__(self._after)
        self._step = after
        self._act = act
        self.done = False
        self.pids: list[int] = []
        self.groups: list[list[str]] = []

    def _after(self, step: int) -> None:
        if step >= self._step and not self.done:
            self.done = True
            self._act(self)

    def on_regroup(self, devices: Sequence[Any]) -> None:
        self.groups.append([reading.name for reading in devices])

    def kinds(self, kind: str) -> list[Any]:
        return [event for event in self.events if event["kind"] == kind]

    def signal(self, devices: Sequence[str], number: signal.Signals) -> None:
        self.pids += [holder(device) for device in devices]
        for pid in self.pids:
            os.kill(pid, number)


def signals(*devices: str, number: signal.Signals = signal.SIGKILL) -> Callable[[Harm], None]:
    """An act: send a signal to the replicas on these devices."""
    return lambda harm: harm.signal(devices, number)


def run(run_dir: Path, harm: Watcher, **changes: Any) -> Result:
    values = {"capacities": THREE, "precision": "fp64", "tensorboard": False, **changes}
    return revdist.Trainer(settings(**values), observer=harm, run_dir=run_dir).fit()


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_state(newest(run_dir / "checkpoints"))


def assert_nothing_was_lost(harm: Watcher, result: Result, unharmed: dict[str, torch.Tensor], *, steps: int) -> None:
    """Each step, and so each sample, was taken once; all replicas hold the weights of the unharmed run."""
    assert [step["step"] for step in harm.steps] == list(range(1, steps + 1))
    assert all(sum(rank["share"] for rank in step["ranks"]) == 10 for step in harm.steps)
    assert result.metrics["replicas_identical"]
    final = final_state(result.run_dir)
    assert final.keys() == unharmed.keys()
    for name, tensor in unharmed.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=BOUND, msg=name)

"""Ways to start the training: how each is launched, and how its steps and processes are seen."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.recovery.training import ENDLESS, GLOBAL_BATCH, MODEL_KWARGS, OPTIMIZER_KWARGS
from benchmarks.recovery.watching import MARK, Step, pid_of_log, steps_of_logs
from revdist.devices import list_devices
from revdist.training.run_directory import RunReader

HERE = Path(__file__).parent
HEARTBEAT_S = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One way to run the training."""

    key: str
    label: str
    packages: tuple[str, ...]
    """Distributions that have to be installed."""
    launch: Callable[[Path, Mapping[str, str], int], None]
    """Start it in a folder with an environment, for so many workers, and come back."""
    steps: Callable[[Path], list[Step]] = steps_of_logs
    pid: Callable[[Path, int], int | None] = pid_of_log
    replans: bool = False
    """Whether a rank's work can be changed while it trains."""


def environment(folder: Path) -> dict[str, str]:
    """Of every process of a job."""
    return {
        **os.environ,
        MARK: str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "REVDIST_DEVICES_DIR": str(folder / "devices"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    }


def _torchrun(folder: Path, env: Mapping[str, str], num_workers: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}", "--max-restarts=3"]
    _start([*torchrun, str(HERE / "torchrun_worker.py"), str(folder)], folder, env)


def _torchrun_own_store(folder: Path, env: Mapping[str, str], num_workers: int) -> None:
    _torchrun(folder, {**env, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, num_workers)


def _ray_train(folder: Path, env: Mapping[str, str], num_workers: int) -> None:
    _start([str(HERE / "ray_train_driver.py"), str(folder), str(num_workers)], folder, env)


def _torchft(folder: Path, env: Mapping[str, str], num_workers: int) -> None:
    port = _free_port()
    lighthouse = Path(sys.executable).with_name("torchft_lighthouse")
    beat = [f"--heartbeat_timeout_ms={HEARTBEAT_S * 1000:.0f}", "--join_timeout_ms=1000", "--quorum_tick_ms=50"]
    _start([f"--bind=127.0.0.1:{port}", "--min_replicas=1", *beat], folder, env, program=str(lighthouse))
    for rank in range(num_workers):
        env = {**env, "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
        _start([str(HERE / "torchft_worker.py"), str(folder), str(rank), str(num_workers)], folder, env)


def _revdist(folder: Path, env: Mapping[str, str], num_workers: int) -> None:
    (folder / "run.json").write_text(json.dumps(_revdist_config(num_workers)), encoding="utf-8")
    _start(["-m", "revdist.cli", "launch", str(folder / "run.json"), "--run-dir", str(folder / "run")], folder, env)


def _revdist_config(num_workers: int) -> dict[str, Any]:
    capacity = "64MiB"
    return {
        "name": "recovery",
        "model": {"factory": "revdist.models:revnet_digits", "kwargs": MODEL_KWARGS},
        "data": {"factory": "revdist.training.datasets:digits"},
        "optimizer": {"factory": "torch.optim:SGD", "kwargs": OPTIMIZER_KWARGS, "schedule": "constant"},
        "global_batch": GLOBAL_BATCH,
        "steps": ENDLESS,
        "evaluate": False,
        "tensorboard": False,
        "devices": [{"kind": "cpu", "name": f"cpu-{rank}", "capacity": capacity} for rank in range(num_workers)],
        "faults": {"heartbeat_s": HEARTBEAT_S},
        # A part of what is free would make the budget another one as memory is taken away.
        "memory": {"fragmentation": 0.0},
        "workers": {"max_restarts": 0},
    }


def start_co_tenant(device: str, take: int, folder: Path) -> None:
    """Let another process take memory of a device of the job until the job is ended."""
    command = ["-m", "revdist.devices.co_tenant", "--device", device, "--take", str(take)]
    _start(command, folder, environment(folder), stdin=subprocess.PIPE)


def _revdist_steps(folder: Path) -> list[Step]:
    if not (folder / "run" / "metrics.jsonl").exists():
        return []
    return [Step(float(line["time"]), int(line["step"])) for line in RunReader(folder / "run").metrics()]


def _revdist_pid(folder: Path, rank: int) -> int | None:
    for reading in list_devices(directory=folder / "devices"):
        for holder in reading.holders:
            if reading.name == f"cpu-{rank}" and holder.name.startswith("revdist"):
                return holder.pid
    return None


def _start(
    arguments: list[str],
    folder: Path,
    env: Mapping[str, str],
    *,
    program: str = sys.executable,
    stdin: int = subprocess.DEVNULL,
) -> None:
    with (folder / f"output-{time.monotonic_ns()}.log").open("w") as out:
        process = subprocess.Popen(
            [program, *arguments], env=dict(env), stdin=stdin, stdout=out, stderr=out, cwd=folder
        )
    _STARTED.append(process)


_STARTED: list[subprocess.Popen[bytes]] = []
"""Kept, so that what they read from stays open."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SUBJECTS = (
    Subject(key="torchrun", label="torchrun", packages=("torch",), launch=_torchrun),
    Subject(
        key="torchrun-own-store",
        label="torchrun, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        packages=("torch",),
        launch=_torchrun_own_store,
    ),
    Subject(key="ray-train", label="Ray Train v2", packages=("ray", "pyarrow"), launch=_ray_train),
    Subject(key="torchft", label="torchft nightly", packages=("torchft-nightly",), launch=_torchft),
    Subject(
        key="revdist",
        label="revdist",
        packages=("revdist",),
        launch=_revdist,
        steps=_revdist_steps,
        pid=_revdist_pid,
        replans=True,
    ),
)

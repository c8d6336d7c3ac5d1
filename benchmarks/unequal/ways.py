"""The ways of training in a case, each a fresh job: seconds of its steps."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.provenance import ROOT
from benchmarks.unequal.cases import DATA, GLOBAL_BATCH, MODEL, OPTIMIZER, Case
from revdist.devices import list_devices
from revdist.planning.split import equal_split
from revdist.training.run_directory import RunReader

WORKER = Path(__file__).with_name("plain_worker.py")
_BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
_LOOK_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One job."""

    step_s: tuple[float, ...]
    shares: tuple[int, ...]
    """At the end."""
    settled: int
    """Number of the first step whose time counts: before it, shares and schedules were still found."""

    @property
    def samples_per_s(self) -> float:
        """By the median step, once settled."""
        return sum(self.shares) / statistics.median(self.step_s[self.settled :])

    @property
    def samples_per_s_overall(self) -> float:
        """By all steps since it settled."""
        counted = self.step_s[self.settled :]
        return sum(self.shares) * len(counted) / sum(counted)


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """Where jobs run. Each has device ledgers of its own; profiles are kept between jobs."""

    folder: Path
    steps: int

    def plain(self, case: Case, shares: Sequence[int], *, same_micro_batch: bool) -> Outcome:
        """DistributedDataParallel written by hand. One micro-batch size for all, or one each.

        torchrun would start each rank in a session of its own, and Linux shares a core between sessions first
        (autogroups): against a neighbour its ranks would get more of a core than Ray's. So all are in this session.
        """
        first, _ = self._plain(case, (0, 1), shares, same_micro_batch=same_micro_batch, together=True)
        return dataclasses.replace(first, shares=tuple(shares))

    def apart(self, case: Case) -> float:
        """What two trainings that exchange nothing reach at once, as part of what each reaches when it has the machine.

        Below one where cores share caches and execution units: no way to train together can do better than this.
        """
        shares = equal_split(GLOBAL_BATCH, 2)
        at_once = self._plain(case, (0, 1), shares, same_micro_batch=False, together=False)
        alone = [self._plain(case, (rank,), shares, same_micro_batch=False, together=False)[0] for rank in (0, 1)]
        return sum(each.samples_per_s for each in at_once) / sum(each.samples_per_s for each in alone)

    def _plain(
        self, case: Case, ranks: Sequence[int], shares: Sequence[int], *, same_micro_batch: bool, together: bool
    ) -> list[Outcome]:
        job_folder = Path(tempfile.mkdtemp(dir=self.folder))
        outs = [job_folder / f"out-{rank}.json" for rank in (0, 1)]
        job = {
            "cores": [0, 1],
            "devices": [[f"cpu-{rank}", capacity] for rank, capacity in enumerate(case.smallest_capacities)],
            "shares": list(shares),
            "steps": self.steps,
            "same_micro_batch": same_micro_batch,
            "out": [str(out) for out in outs],
        }
        (job_folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(WORKER), str(job_folder / "job.json")]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environment = self._environment(job_folder) | rendezvous | {"WORLD_SIZE": "2" if together else "1"}
        with neighbour(case), ThreadPoolExecutor() as pool:
            list(pool.map(lambda rank: _run(command, environment | {"RANK": str(rank)}), ranks))
        seconds = [json.loads(outs[rank].read_text(encoding="utf-8"))["seconds"] for rank in ranks]
        return [
            Outcome(step_s=tuple(each), shares=(shares[rank],), settled=self.steps // 3)
            for rank, each in zip(ranks, seconds, strict=True)
        ]

    def revdist(self, case: Case, *, ranks: Sequence[int] = (0, 1), global_batch: int = GLOBAL_BATCH) -> Outcome:
        """`revdist launch` on the devices and cores `ranks`."""
        job_folder = Path(tempfile.mkdtemp(dir=self.folder))
        config = _config(case, ranks, global_batch, self.steps)
        (job_folder / "run.json").write_text(json.dumps(config), encoding="utf-8")
        environment = self._environment(job_folder)
        command = [sys.executable, "-m", "revdist.cli", "launch", str(job_folder / "run.json")]
        with neighbour(case), pinned({f"cpu-{rank}": rank for rank in ranks}, Path(environment["REVDIST_DEVICES_DIR"])):
            _run([*command, "--run-dir", str(job_folder / "run")], environment)
        steps = list(RunReader(job_folder / "run").metrics())
        shares = tuple(int(rank["share"]) for rank in steps[-1]["ranks"])
        return Outcome(step_s=tuple(step["step_s"] for step in steps), shares=shares, settled=_settled(steps))

    def alone(self, case: Case, rank: int) -> Outcome:
        """revdist on one device of the case, the other idle, with half the batch."""
        return self.revdist(case, ranks=(rank,), global_batch=equal_split(GLOBAL_BATCH, 2)[rank])

    def _environment(self, job_folder: Path) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "REVDIST_CACHE_DIR": str(self.folder / "cache"),
            "REVDIST_DEVICES_DIR": str(job_folder / "devices"),
        }


def _config(case: Case, ranks: Sequence[int], global_batch: int, steps: int) -> dict[str, Any]:
    co_tenants = []
    if case.taken and 1 in ranks:
        take = int(case.capacities[1] * case.taken)
        co_tenants = [{"device": "cpu-1", "take": take, "from_step": steps // 3, "to_step": 2 * steps // 3}]
    return {
        "name": "unequal",
        "model": {"factory": MODEL},
        "data": {"factory": DATA},
        "optimizer": {"factory": "torch.optim:SGD", "kwargs": OPTIMIZER, "schedule": "constant"},
        "global_batch": global_batch,
        "steps": steps,
        "evaluate": False,
        "tensorboard": False,
        "devices": [{"kind": "cpu", "name": f"cpu-{rank}", "capacity": case.capacities[rank]} for rank in ranks],
        "co_tenants": co_tenants,
        # Its key knows the device's kind and not who else computes there: each job measures what it has.
        "planning": {"profile_cache": False},
    }


def _settled(steps: Sequence[Mapping[str, Any]]) -> int:
    """A third of the run is for finding shares and schedules; they may go on changing after it."""
    return len(steps) // 3


@contextmanager
def neighbour(case: Case) -> Iterator[None]:
    """A process that computes on the second core as long as the job runs, where the case has one."""
    if not case.neighbour:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", _BUSY, "1"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


@contextmanager
def pinned(cores: Mapping[str, int], devices: Path) -> Iterator[None]:
    """Keep the process that holds each device on its core: Ray starts them where the system likes."""
    over = threading.Event()
    thread = threading.Thread(target=_pin, args=(cores, devices, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _pin(cores: Mapping[str, int], devices: Path, over: threading.Event) -> None:
    held: set[int] = set()
    while not over.wait(_LOOK_S):
        if len(held) == len(cores) or not devices.exists():
            continue
        for reading in list_devices(directory=devices):
            for holder in reading.holders:
                if reading.name in cores and holder.name.startswith("revdist") and holder.pid not in held:
                    _pin_threads(holder.pid, cores[reading.name])
                    held.add(holder.pid)


def _pin_threads(pid: int, core: int) -> None:
    for thread in psutil.Process(pid).threads():
        try:
            os.sched_setaffinity(thread.id, {core})
        except ProcessLookupError:
            continue


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")

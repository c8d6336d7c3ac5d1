"""The ways of training in a case, each as a job that takes turns with the others."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.provenance import ROOT
from benchmarks.unequal.cases import DATA, MODEL, OPTIMIZER, Case
from benchmarks.unequal.job import Feed, Job, Turn
from benchmarks.unequal.losses import Losses, StepTimes
from revdist.devices import list_devices
from revdist.planning.split import equal_split
from revdist.training.run_directory import RunReader

WORKER = Path(__file__).with_name("plain_worker.py")
_BUSY = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
_ENDLESS = 10**6
_AWAY_S = 3600.0
"""No replica and no Ray head is given up for having been stopped with all the others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """Where jobs are started. Each has device ledgers of its own."""

    folder: Path
    global_batch: int
    """Samples a step of both devices together."""

    def plain(self, case: Case, shares: Sequence[int], *, same_micro_batch: bool) -> Job:
        """DistributedDataParallel written by hand. One micro-batch size for all, or one each.

        torchrun would start each rank in a session of its own, and Linux shares a core between sessions first
        (autogroups): against a neighbour its ranks would get more of a core than Ray's. So all are in this session.
        """
        return self._by_hand(case, (0, 1), shares, same_micro_batch=same_micro_batch, together=True)

    def apart(self, case: Case, ranks: Sequence[int] = (0, 1)) -> Job:
        """Trainings written by hand that exchange nothing, at once, each with half the batch."""
        shares = equal_split(self.global_batch, 2)
        return self._by_hand(case, ranks, shares, same_micro_batch=False, together=False)

    def revdist(self, case: Case, *, ranks: Sequence[int] = (0, 1), global_batch: int | None = None) -> RevdistJob:
        """`revdist launch` on the devices and cores `ranks`. global_batch: another than that of both."""
        global_batch = global_batch or self.global_batch
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "run.json").write_text(json.dumps(_config(case, ranks, global_batch)), encoding="utf-8")
        command = [sys.executable, "-m", "revdist.cli", "launch", str(folder / "run.json")]
        return RevdistJob(
            [*command, "--run-dir", str(folder / "run")],
            self._environment(folder),
            Feed(folder / "run" / "metrics.jsonl", global_batch, as_json=True),
            cores={f"cpu-{rank}": rank for rank in ranks},
            taken_bytes=int(case.capacities[1] * case.taken) if 1 in ranks else 0,
        )

    def alone(self, case: Case, rank: int) -> RevdistJob:
        """revdist on one device of the case, the other idle, with half the batch."""
        return self.revdist(case, ranks=(rank,), global_batch=equal_split(self.global_batch, 2)[rank])

    def _by_hand(
        self, case: Case, ranks: Sequence[int], shares: Sequence[int], *, same_micro_batch: bool, together: bool
    ) -> Job:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        outs = [folder / f"steps-{rank}" for rank in (0, 1)]
        content = {
            "cores": [0, 1],
            "devices": [[f"cpu-{rank}", capacity] for rank, capacity in enumerate(case.smallest_capacities)],
            "global_batch": self.global_batch,
            "shares": list(shares),
            "same_micro_batch": same_micro_batch,
            "out": [str(out) for out in outs],
        }
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, str(WORKER), str(folder / "job.json")]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environment = self._environment(folder) | rendezvous | {"WORLD_SIZE": "2" if together else "1"}
        feeds = [Feed(outs[0], self.global_batch)] if together else [Feed(outs[rank], shares[rank]) for rank in ranks]
        return Job([(command, environment | {"RANK": str(rank)}) for rank in ranks], feeds)

    def _environment(self, folder: Path) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "REVDIST_DEVICES_DIR": str(folder / "devices"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": f"{2 * _AWAY_S:.0f}",
        }


class RevdistJob(Job):
    """`revdist launch`. Each process that holds a device is kept on its core: Ray starts it where the system likes."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], feed: Feed, *,
        cores: Mapping[str, int], taken_bytes: int,
    ) -> None:  # fmt: skip
        """taken_bytes: what another process takes of cpu-1 for a while."""
        super().__init__([(command, environment)], [feed], every_look=self._pin)
        self._environment = environment
        self._cores = cores
        self._taken_bytes = taken_bytes
        self._pinned: set[int] = set()
        self._tenant: subprocess.Popen[bytes] | None = None

    def __exit__(self, *raised: object) -> None:
        self.give_back()
        super().__exit__(*raised)

    def shares(self) -> tuple[int, ...]:
        """Of the last step."""
        *_, last = RunReader(self.feeds[0].path.parent).metrics()
        return tuple(int(rank["share"]) for rank in last["ranks"])

    def losses(self, turns: Sequence[Turn]) -> Losses:
        """Where the time of its steps in these turns went. The first of each began before the turn."""
        records = list(RunReader(self.feeds[0].path.parent).metrics())
        within = [[record for record in records if turn.began_s <= record["time"] <= turn.ended_s] for turn in turns]
        return Losses.of([StepTimes.of_record(record) for turn in within for record in turn[1:]])

    def change_memory(self, number: int, rounds: int) -> None:
        """At the begin of its turn in a round: another process has memory in the middle third of the rounds."""
        if number == rounds // 3:
            self._take()
        if number == 2 * rounds // 3:
            self.give_back()

    def _take(self) -> None:
        if self._taken_bytes:
            command = [sys.executable, "-m", "revdist.devices.co_tenant", "--device", "cpu-1", "--patience", "600"]
            self._tenant = subprocess.Popen(
                [*command, "--take", str(self._taken_bytes)], env=dict(self._environment),
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def give_back(self) -> None:
        """It gives back what it took."""
        if self._tenant is not None:
            self._tenant.terminate()
            self._tenant.wait()
            self._tenant = None

    def _pin(self) -> None:
        devices = Path(self._environment["REVDIST_DEVICES_DIR"])
        if len(self._pinned) == len(self._cores) or not devices.exists():
            return
        for reading in list_devices(directory=devices):
            for holder in reading.holders:
                is_replica = reading.name in self._cores and holder.name.startswith("revdist")
                if is_replica and holder.pid not in self._pinned:
                    _pin_threads(holder.pid, self._cores[reading.name])
                    self._pinned.add(holder.pid)


def _config(case: Case, ranks: Sequence[int], global_batch: int) -> dict[str, Any]:
    return {
        "name": "unequal",
        "model": {"factory": MODEL},
        "data": {"factory": DATA, "kwargs": {"batch": global_batch}},
        "optimizer": {"factory": "torch.optim:SGD", "kwargs": OPTIMIZER, "schedule": "constant"},
        "global_batch": global_batch,
        "steps": _ENDLESS,
        "evaluate": False,
        "tensorboard": False,
        "devices": [{"kind": "cpu", "name": f"cpu-{rank}", "capacity": case.capacities[rank]} for rank in ranks],
        "faults": {"heartbeat_s": _AWAY_S, "head_s": _AWAY_S},
        # Each job measures for itself, as the first one on a machine does.
        "planning": {"profile_cache": False},
    }


@contextmanager
def neighbour(case: Case) -> Iterator[None]:
    """A process that computes on the second core all the time, where the case has one."""
    if not case.neighbour:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", _BUSY, "1"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


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

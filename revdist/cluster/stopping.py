"""Ending a run from outside, and making sure that nothing of it is left."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from pathlib import Path

from revdist.cluster.claim import is_alive
from revdist.cluster.processes import Process, started_with, writing_below
from revdist.cluster.run_record import RUN_ID, RunRecord, read_record, write_record
from revdist.cluster.session import is_own_session, remove_session
from revdist.errors import AddressUnreachable, RunFailed, UsageError

_TICK_S = 0.1
_LEAVE_S = 10.0
"""Time for what a run has started, Ray's processes and co-tenants, to be gone once its driver is."""
_DEATH_S = 10.0
"""Time for killed processes to be gone."""
_KILLED = 128 + signal.SIGKILL


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """How a run was ended."""

    record: RunRecord
    was_alive: bool
    num_killed: int
    """Processes that did not leave by themselves."""


def stop_run(run_dir: Path, *, now: bool, timeout_s: float) -> Stopped:
    """Ask a run to save and leave, wait until it has, and end what does not.

    now: do not ask, kill. timeout_s: time to save, after which it is killed.
    Raises UsageError where there is no run, or its driver is on another host, and RunFailed where
    something of it could not be ended.
    """
    record = read_record(run_dir)
    if record is None:
        raise UsageError(f"no run has been started in {run_dir}; `revdist launch` says where it writes")
    was_alive = is_alive(run_dir)
    if was_alive and not record.here:
        raise UsageError(
            f"the run in {run_dir} is driven by process {record.process.pid} on {record.host}: stop it there"
        )
    in_order = False
    if was_alive and not now and record.process.send(signal.SIGTERM):
        in_order = _wait(lambda: not is_alive(run_dir) and not record.process.alive, timeout_s)
    killed = _end_family(record, patience_s=_LEAVE_S if in_order else 0.0) if record.here else 0
    if record.detached and not record.own_ray and not in_order:
        killed += _end_replicas(record)
    if record.own_ray and record.here:
        remove_session(record.ray_session)
    return Stopped(record=_closed(run_dir), was_alive=was_alive, num_killed=killed)


def _end_family(record: RunRecord, *, patience_s: float) -> int:
    """Wait for all that the run has on this host to leave, kill what does not; returns how many were killed."""
    killed: set[Process] = set()
    _wait(lambda: not _family(record), patience_s)
    deadline_s = time.monotonic() + _DEATH_S
    while family := _family(record):
        if time.monotonic() > deadline_s:
            pids = " ".join(str(process.pid) for process in family)
            raise RunFailed(f"processes {pids} of the run do not end; look at them with `ps -o stat,wchan,args {pids}`")
        for process in family:
            if process.send(signal.SIGKILL):
                killed.add(process)
        time.sleep(_TICK_S)
    # One that is ending has no environment any more by which it could be found, but is there.
    _wait(lambda: not any(process.alive for process in killed), _DEATH_S)
    return len(killed)


def _family(record: RunRecord) -> list[Process]:
    """Living processes of the run on this host, those that start others first.

    They are its driver and watchman, replicas, co-tenants, and Ray's, where the cluster is its own. Some of
    Ray's write their title over their environment, so that only their files tell whose they are.
    """
    found = set(started_with(RUN_ID, record.run_id))
    if is_own_session(record.ray_session):
        found.update(writing_below(record.ray_session))
    if record.ended_s is None and record.process.alive:
        found.add(record.process)
    return sorted(found, key=lambda process: process.pid)


def _end_replicas(record: RunRecord) -> int:
    """End replicas that outlive their driver in a cluster that is not the run's own; returns how many there were."""
    from revdist.cluster.local import ray_cluster

    try:
        with ray_cluster(record.ray_address, num_workers=0):
            from revdist.cluster.takeover import end

            return end(record.run_id)
    except AddressUnreachable:  # they are gone with their cluster, or leave once they find themselves alone
        return 0


def _closed(run_dir: Path) -> RunRecord:
    """The record as it stays: a killed driver could not write how it ended."""
    _wait(lambda: not is_alive(run_dir), _DEATH_S)  # threads of a dead process may hold its files for a moment
    record = read_record(run_dir)
    assert record is not None
    if record.ended_s is None and not is_alive(run_dir):
        record = dataclasses.replace(
            record,
            state="stopped",
            ended_s=time.time(),
            exit_code=_KILLED,
            error=(
                f"killed by `revdist stop {run_dir}` without saving",
                "go on from its newest checkpoint with --resume",
            ),
        )
        write_record(run_dir, record)
    return record


def _wait(done: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it is done within the time."""
    until_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > until_s:
            return False
        time.sleep(_TICK_S)
    return True

"""Which rank failed first, and how to say so: rank, host, cause, remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import GetTimeoutError, RayError

from revdist.cluster.actor import Location
from revdist.cluster.fleet import Lost
from revdist.errors import BudgetTooSmall, DeviceError, OutOfDeviceMemory, RevdistError, RunFailed, UsageError
from revdist.training.reports import FailureReport

Failure = FailureReport | Lost


def first_failure(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from.

    When a rank fails, its peers fail as well, since it no longer answers: those errors come first in
    time as often as not, but they say what they are.
    """
    own = [f for f in failures if isinstance(f, FailureReport) and not f.follows]
    if own:
        return min(own, key=lambda failure: failure.time)
    lost = [f for f in failures if isinstance(f, Lost)]
    return lost[0] if lost else failures[0]


def run_failed(
    failure: Failure, location: Location, *, started: bool, resumable: bool, run_dir: Path | None = None
) -> RevdistError:
    """The error of a run. Before anything was written, what cannot run is said by its own error."""
    if isinstance(failure, FailureReport) and isinstance(failure.error, UsageError) and not started:
        return failure.error
    cause, remedy, facts = _explain(failure)
    if started and run_dir is not None and (isinstance(failure, Lost) or "traceback" in facts):
        said = f"`revdist logs {run_dir} --rank {failure.rank}` shows its last words"
        remedy = f"{remedy}; {said}" if remedy else said
    if resumable:
        remedy = f"{remedy}; then go on with --resume" if remedy else "go on with --resume"
    where = f"rank {failure.rank} on {location.host} ({location.reading.name}, process {location.pid})"
    kind = (
        type(failure.error)
        if isinstance(failure, FailureReport) and isinstance(failure.error, RunFailed)
        else RunFailed
    )
    return kind(
        f"{where} failed: {cause}" + (f"; {remedy}" if remedy else ""),
        **{
            **facts,
            "rank": failure.rank,
            "host": location.host,
            "device": location.reading.uuid,
            "cause": cause,
            "remedy": remedy,
        },
    )


def is_survivable(failure: Failure) -> bool:
    """Whether the other ranks can go on: the process or its device is at fault, not what all ranks run alike."""
    if isinstance(failure, Lost):
        return True
    memory = (
        isinstance(failure.error, BudgetTooSmall | OutOfDeviceMemory)
        or failure.error.facts.get("cause") == "OutOfMemoryError"
    )
    accelerator = failure.error.facts.get("cause") == "AcceleratorError"
    return failure.follows or isinstance(failure.error, DeviceError) or memory or accelerator


def is_loss(failure: Failure) -> bool:
    """Whether a process or its device is gone, so that another one can do what it did."""
    if isinstance(failure, Lost):
        return True
    return failure.follows or isinstance(failure.error, DeviceError)


def what_failed(failure: Failure) -> str:
    """Cause in a few words."""
    return _explain(failure)[0]


def why(error: Exception) -> str:
    """What kept an actor from answering a call, in a few words."""
    if isinstance(error, GetTimeoutError):
        return "it did not answer in time"
    if isinstance(error, RayError):
        return _explain(Lost(-1, str(error)))[0]
    first_line = str(error).partition("\n")[0]
    return first_line if isinstance(error, RevdistError) else f"{type(error).__name__}: {first_line}"


def describe(failure: Failure, location: Location) -> str:
    """Which rank is lost, where it ran, and why."""
    where = f"rank {failure.rank} on {location.host} ({location.reading.name}, process {location.pid})"
    return f"{where}: {what_failed(failure)}"


def _explain(failure: Failure) -> tuple[str, str, dict[str, object]]:
    """Cause, remedy and facts."""
    if isinstance(failure, FailureReport):
        message, _, remedy = failure.error.message.partition("; ")
        return f"step {failure.step}: {message}", remedy, failure.error.facts
    if "running low on memory" in failure.detail:
        return (
            "its process was killed by Ray's memory monitor: the host was nearly out of memory",
            "free memory on the host or let fewer replicas run there, or start Ray with RAY_memory_usage_threshold "
            "nearer to 1, or RAY_memory_monitor_refresh_ms=0, which turns the monitor off",
            {},
        )
    if "not schedulable" in failure.detail:
        return "its host left the cluster before its process had started", "look at the host", {}
    if "creation task" in failure.detail:
        return f"its process could not start: {failure.detail.splitlines()[-1]}", "see what its host has installed", {}
    if "did not answer" in failure.detail:
        return failure.detail, "look at the host and the way to it, or set faults.heartbeat_s higher", {}
    code = re.search(r"exit code (\d+)|connection error code \d+", failure.detail)
    if "SIGKILL" in failure.detail or "connection error" in failure.detail or code is None:
        return (
            "its process was killed",
            "look for the kernel's out-of-memory killer (`dmesg | grep -i kill`) or whoever ended it",
            {},
        )
    return f"its process ended ({code[0]})", "", {}

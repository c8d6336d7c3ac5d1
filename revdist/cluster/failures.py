"""Which rank failed first, and how to say so: rank, host, cause, remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from revdist.cluster.actor import Location
from revdist.cluster.fleet import Lost
from revdist.errors import RevdistError, RunFailed, UsageError
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


def run_failed(failure: Failure, location: Location, *, started: bool, resumable: bool) -> RevdistError:
    """The error of a run. Before anything was written, what cannot run is said by its own error."""
    if isinstance(failure, FailureReport) and isinstance(failure.error, UsageError) and not started:
        return failure.error
    cause, remedy, facts = _explain(failure)
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
        **{**facts, "rank": failure.rank, "host": location.host, "cause": cause, "remedy": remedy},
    )


def _explain(failure: Failure) -> tuple[str, str, dict[str, object]]:
    """Cause, remedy and facts."""
    if isinstance(failure, FailureReport):
        message, _, remedy = failure.error.message.partition("; ")
        return f"step {failure.step}: {message}", remedy, failure.error.facts
    code = re.search(r"exit code (\d+)|connection error code \d+", failure.detail)
    if "SIGKILL" in failure.detail or "connection error" in failure.detail or code is None:
        return (
            "its process was killed",
            "look for the kernel's out-of-memory killer (`dmesg | grep -i kill`) or whoever ended it",
            {},
        )
    return f"its process ended ({code[0]})", "see its log in /tmp/ray/session_latest/logs", {}

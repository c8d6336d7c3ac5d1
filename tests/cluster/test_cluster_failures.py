"""The first failing rank is named, with its host, the cause and the remedy."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray.exceptions import ActorUnschedulableError, RayError
from runs import cpu_reading

from revdist.cluster.actor import Location
from revdist.cluster.failures import first_failure, is_survivable, run_failed, why
from revdist.cluster.fleet import Lost
from revdist.errors import (
    BudgetTooSmall,
    DeviceLost,
    DeviceNotFound,
    FactoryError,
    NonFiniteLoss,
    OutOfDeviceMemory,
    RevdistError,
    RunFailed,
)
from revdist.training.reports import FailureReport

HERE = Location(
    host="host-b",
    address="10.0.0.2",
    pid=77,
    store_port=1,
    reading=cpu_reading("cpu-1", uuid="CPU-1", host="host-b", index=1),
)


def report(rank: int, error: RevdistError, *, time: float = 1.0, follows: bool = False) -> FailureReport:
    return FailureReport(time=time, rank=rank, step=4, error=error, follows=follows)


def failed(failure: Any, **state: bool) -> RevdistError:
    return run_failed(failure, HERE, **{"started": True, "resumable": False, **state})


def test_the_failure_that_others_follow_from_comes_first() -> None:
    cause = report(2, RunFailed("ValueError: bad"), time=9.0)
    followers = [report(0, RunFailed("Connection closed by peer"), follows=True), Lost(1, "gone")]
    assert first_failure([*followers, cause]) is cause
    assert first_failure(followers) == Lost(1, "gone")
    assert first_failure(followers[:1]) is followers[0]


def test_a_failure_names_rank_host_cause_and_remedy() -> None:
    error = failed(report(2, RunFailed("ValueError: bad", traceback="...")), resumable=True)
    assert error.message == (
        "rank 2 on host-b (cpu-1, process 77) failed: step 4: ValueError: bad; go on with --resume"
    )
    assert error.facts["traceback"] == "..."
    assert error.facts["remedy"] == "go on with --resume"
    assert pickle.loads(pickle.dumps(error)).facts == error.facts


def test_a_remedy_of_the_error_is_kept() -> None:
    error = failed(report(2, BudgetTooSmall(1, 3, where="cpu-1")))
    assert error.exit_code == 1
    assert error.facts["remedy"] == "lower micro_batch or free 2 B"


@pytest.mark.parametrize(
    ("error", "survivable"),
    [
        (BudgetTooSmall(1, 3), True),
        (OutOfDeviceMemory("cpu-1 ran out of memory"), True),
        (RunFailed("OutOfMemoryError: no room", cause="OutOfMemoryError"), True),
        (DeviceLost("fell off the bus"), True),
        (RunFailed("ValueError: bad", cause="ValueError"), False),
        (FactoryError("cannot import m:f"), False),
    ],
)
def test_others_go_on_where_a_device_is_at_fault_and_not_what_all_run(error: RevdistError, survivable: bool) -> None:
    assert is_survivable(report(1, error)) == survivable


def test_what_cannot_start_is_the_caller_s_mistake() -> None:
    mistake = FactoryError("cannot import m:f")
    assert failed(report(0, mistake), started=False) is mistake


def test_the_kind_of_failure_is_kept() -> None:
    assert isinstance(failed(report(0, NonFiniteLoss("nan", samples=[3]))), NonFiniteLoss)


@pytest.mark.parametrize(
    ("detail", "said"),
    [
        ("Worker exits unexpectedly: SIGKILL", "its process was killed"),
        ("Worker exits with exit code 3.", "its process ended (exit code 3)"),
        ("the node died", "its process was killed"),
        ("1 worker(s) were killed due to the node running low on memory. Memory ...", "Ray's memory monitor"),
        ("1 worker(s) were killed due to the node running low on memory. Memory ...", "RAY_memory_usage_threshold"),
    ],
)
def test_a_lost_process_is_said_to_be_lost(detail: str, said: str) -> None:
    assert said in failed(Lost(1, detail)).message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DeviceNotFound("no device cpu-7"), "no device cpu-7"),
        (OSError(98, "Address already in use"), "OSError: [Errno 98] Address already in use"),
        (ValueError(), "ValueError: "),
        (
            ActorUnschedulableError("The node specified doesn't exist any more or is infeasible."),
            "its host left the cluster before its process had started",
        ),
        (
            RayError("The actor died because of an error raised in its creation task, ...\nImportError: no module x"),
            "its process could not start: ImportError: no module x",
        ),
    ],
)
def test_a_newcomer_s_failure_is_told_in_a_few_words(error: Exception, said: str) -> None:
    assert why(error) == said

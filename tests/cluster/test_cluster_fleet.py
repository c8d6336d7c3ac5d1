"""What a fleet makes of calls that Ray does not answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, ActorUnschedulableError, OutOfMemoryError, RayError, RayTaskError

from revdist.cluster import fleet
from revdist.cluster.fleet import Fleet, Known, Lost
from revdist.cluster.placement import Host
from revdist.training.reports import LogReport


class Actor:
    """Whose calls all fail with this error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Call(self._error))


class Call:
    def __init__(self, error: Exception) -> None:
        self.error = error


def answer(call: Call, **options: Any) -> Any:
    raise call.error


def wait(calls: Sequence[Call], **options: Any) -> tuple[list[Call], list[Call]]:
    return list(calls), []


def led(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> Fleet:
    """A fleet of actors that fail so."""
    monkeypatch.setattr(fleet, "ray", SimpleNamespace(get=answer, wait=wait))
    made = Fleet((), threads=1)
    made.take_over({member: Known(Actor(error), "") for member, error in enumerate(errors)}, next_member=len(errors))
    return made


LOSSES = [
    ActorDiedError(),
    OutOfMemoryError("killed due to the node running low on memory"),
    ActorUnschedulableError("the node is gone"),
]


@pytest.mark.parametrize("error", LOSSES, ids=lambda error: type(error).__name__)
def test_whatever_ray_says_of_a_replica_that_is_gone_it_is_lost(
    error: RayError, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = led(monkeypatch, error)
    assert list(made.reports(0)) == [(0, Lost(0, str(error)))]
    for _ in range(2):  # asks whether it is alive, and takes the answer
        assert made.silent([0], 60.0) == []
    assert list(made.rest_of_logs({0: cast(LogReport, None)})) == []


def test_what_reports_raises_in_the_actor_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    made = led(monkeypatch, RayTaskError("reports", "traceback", ZeroDivisionError()))
    with pytest.raises(RayTaskError):
        list(made.reports(0))
    with pytest.raises(ZeroDivisionError):
        fleet.Fleet.get(Call(RayTaskError("locate", "traceback", ZeroDivisionError())))


def test_only_those_that_open_their_device_are_located_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    made = led(monkeypatch, *LOSSES, RayTaskError("locate", "traceback", OSError("no such address")))
    assert made.locate_soon(dict.fromkeys(range(4), "10.0.0.1"), timeout_s=0) == {}


def test_hosts_are_asked_once_which_devices_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def uuids(hosts: Sequence[Host]) -> dict[str, frozenset[str]]:
        asked.append([host.node_id for host in hosts])
        return {host.node_id: frozenset({f"GPU-{host.node_id}"}) for host in hosts if host.node_id != "silent"}

    there = [Host(node_id=name, address=name, cpus=1, gpus=1) for name in ("a", "b", "silent")]
    monkeypatch.setattr(fleet, "hosts", lambda group: there)
    monkeypatch.setattr(fleet, "uuids", uuids)
    made = Fleet((), threads=1, by_uuid=True)
    for _ in range(2):
        assert [host.uuids for host in made.free_hosts()] == [{"GPU-a"}, {"GPU-b"}, frozenset()]
    assert asked == [["a", "b", "silent"], ["silent"]]
    assert Fleet((), threads=1).free_hosts() == there

"""Newcomers are found on what hosts have free, as many at a time as there is room for."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnschedulableError
from runs import settings

from revdist.cluster import recruiting
from revdist.cluster.failures import why
from revdist.cluster.fleet import Fleet
from revdist.cluster.placement import Host, Place
from revdist.cluster.recruiting import Recruiter
from revdist.config import DeviceSpec, RunConfig


class EmptyFleet:
    """Finds these hosts, starts nothing, and remembers where it was told to."""

    def __init__(self, *hosts: Host) -> None:
        self.hosts = list(hosts)
        self.added: list[Place] = []
        self.forgotten: list[int] = []
        self.told: list[str] = []
        self.raises: Exception | None = None
        """What newcomers answer with; None: not at all."""

    def look_for_hosts(self) -> Future[list[Host]]:
        looked: Future[list[Host]] = Future()
        looked.set_result(self.hosts)
        return looked

    def add(self, place: Place) -> int:
        self.added.append(place)
        return 100 + len(self.added)

    def find(self, member: int, address: str) -> int:
        return member

    def has_come(self, call: Any) -> bool:
        return self.raises is not None

    def get(self, call: Any) -> Any:
        assert self.raises is not None
        raise self.raises

    def forget(self, member: int) -> None:
        self.forgotten.append(member)


def host(name: str, *, cpus: float, gpus: float = 0.0) -> Host:
    return Host(node_id=name, address=name, cpus=cpus, gpus=gpus)


def place(node: str, spec: DeviceSpec) -> Place:
    return Place(rank=0, node_id=node, address=node, spec=spec)


def recruiter(fleet: EmptyFleet, *places: Place, **changes: Any) -> Recruiter:
    config = RunConfig.from_mapping(settings(**{"devices": "auto", "global_batch": 64, **changes}))
    return Recruiter(
        config, cast(Fleet, fleet), dict(enumerate(places)), assign=lambda: cast(Any, None), tell=fleet.told.append
    )


CUDA = DeviceSpec(kind="cuda")
CPU = DeviceSpec(kind="cpu", name="cpu-0")


def test_all_gpus_of_a_host_that_came_back_are_started_at_once() -> None:
    fleet = EmptyFleet(host("a", cpus=4, gpus=0), host("b", cpus=8, gpus=3), host("c", cpus=2, gpus=4))
    recruiter(fleet, place("a", CUDA)).advance()
    assert [one.node_id for one in fleet.added] == ["b", "b", "b", "c", "c"]  # c has cores for two


def test_no_more_are_started_than_the_run_may_have() -> None:
    fleet = EmptyFleet(host("b", cpus=8, gpus=8))
    recruiter(fleet, place("a", CUDA), workers={"max": 4}).advance()
    assert len(fleet.added) == 3


def test_of_cpu_devices_each_host_gives_one() -> None:
    fleet = EmptyFleet(host("a", cpus=8), host("b", cpus=8), host("c", cpus=8))
    recruiter(fleet, place("a", CPU)).advance()
    assert [one.node_id for one in fleet.added] == ["b", "c"]


def test_members_lost_together_are_one_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(recruiting.time, "monotonic", lambda: now_s)
    fleet = EmptyFleet(host("a", cpus=8))
    config = RunConfig.from_mapping(settings(capacities=("64MiB",) * 4, workers={"max_restarts": 2}))
    places = {rank: place("a", spec) for rank, spec in enumerate(cast(Any, config.devices))}
    found = Recruiter(config, cast(Fleet, fleet), places, assign=cast(Any, None), tell=print)

    def lose_and_look(*ranks: int) -> list[bool]:
        nonlocal now_s
        replaced = [found.lose(rank) for rank in ranks]
        now_s += 100
        found.advance()
        return replaced

    assert lose_and_look(1, 2, 3) == [True, True, True]
    assert len(fleet.added) == 3
    assert found.restarts == 0  # none is there yet
    found.fail(101, "its host is gone")
    assert found.restarts == 1
    for member in (102, 103):
        found.is_ready(member)
        found.fail(member, "it could not join")
    assert lose_and_look(0) == [True]
    assert len(fleet.added) == 3 + 4
    for member in (104, 105, 106, 107):
        found.is_ready(member)
    assert found.restarts == 2
    assert not found.lose(104)


@pytest.mark.parametrize("spec", [CUDA, CPU], ids=["GPUs", "CPU devices"])
def test_once_restarts_are_used_up_only_new_hosts_are_taken_in(
    spec: DeviceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(recruiting.time, "monotonic", lambda: now_s)
    fleet = EmptyFleet(host("a", cpus=8), host("b", cpus=8, gpus=1))
    found = recruiter(fleet, place("a", spec), place("b", spec), workers={"max_restarts": 1})

    def look() -> list[str]:
        nonlocal now_s
        now_s += 100
        found.advance()
        return [one.node_id for one in fleet.added]

    assert found.lose(1)
    assert look() == ["b"]
    found.fail(101, "its device is broken")
    assert look() == ["b"]
    assert found.restarts == 1
    fleet.hosts.append(host("c", cpus=8, gpus=1))
    assert look() == ["b", "c"]
    assert found.restarts == 1


def test_devices_listed_that_were_missing_at_a_takeover_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(recruiting.time, "monotonic", lambda: now_s)
    fleet = EmptyFleet(host("a", cpus=8))
    found = recruiter(
        fleet, place("a", CPU), devices=[{"kind": "cpu", "name": "cpu-0"}, {"kind": "cpu"}, {"kind": "cpu"}]
    )
    found.advance()
    assert [one.spec.name for one in fleet.added] == ["cpu-1", "cpu-2"]
    for member in (101, 102):
        found.is_ready(member)
    assert found.restarts == 1
    now_s += 100
    found.advance()
    assert len(fleet.added) == 2


def test_newcomers_that_fail_together_are_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(recruiting.time, "monotonic", lambda: now_s)
    fleet = EmptyFleet(host("b", cpus=8, gpus=3))
    found = recruiter(fleet, place("a", CUDA))
    found.advance()
    for member in (101, 102, 103):
        found.fail(member, "its host is gone")
    assert fleet.forgotten == [101, 102, 103]
    now_s += 1.9
    found.advance()
    assert len(fleet.added) == 3
    now_s += 0.2
    found.advance()
    assert len(fleet.added) == 6


@pytest.mark.parametrize("error", [OSError("no such address"), ActorUnschedulableError("the node is gone")])
def test_whatever_a_newcomer_raises_the_run_goes_on_without_it(error: Exception) -> None:
    fleet = EmptyFleet(host("a", cpus=4), host("b", cpus=8))
    found = recruiter(fleet, place("a", CPU))
    found.advance()
    fleet.raises = error
    assert found.advance() == {}
    assert fleet.forgotten == [101]
    assert fleet.told == [f"cpu-0 on b did not join: {why(error)}"]

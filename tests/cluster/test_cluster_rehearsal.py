"""Co-tenants come and go with the steps, on devices whose replicas may be lost."""

from __future__ import annotations

from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from runs import cpu_reading

from revdist.cluster.actor import Location
from revdist.cluster.fleet import Fleet
from revdist.cluster.rehearsal import Rehearsal, check_devices
from revdist.config import CoTenantConfig
from revdist.errors import ConfigError

CO_TENANT = CoTenantConfig(device="cpu-1", take=2**20, from_step=3, to_step=8)


def location(device: str) -> Location:
    reading = cpu_reading(device, uuid=f"CPU-{device}", host="here")
    return Location(host="here", address="127.0.0.1", pid=1, store_port=1, reading=reading)


class Replicas:
    """Stand for a fleet, and remember what they were told."""

    def __init__(self) -> None:
        self.present = {0: (0, location("cpu-0")), 1: (1, location("cpu-1"))}
        self.told: list[tuple[str, int]] = []
        self.fails: RayError | None = None

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(self.present)

    def start_co_tenant(self, member: int, co_tenant: CoTenantConfig) -> int:
        self._tell("start", member)
        return 77

    def end_co_tenant(self, member: int, co_tenant: CoTenantConfig) -> None:
        self._tell("end", member)

    def _tell(self, what: str, member: int) -> None:
        assert member in self.present
        self.told.append((what, member))
        if self.fails is not None:
            raise self.fails


def rehearsal(replicas: Replicas) -> Rehearsal:
    return Rehearsal([CO_TENANT], cast(Fleet, replicas), present=lambda: replicas.present)


def details(events: list[dict[str, Any]]) -> list[tuple[int, str]]:
    assert all(event["device"] == "CPU-cpu-1" for event in events)
    return [(event["rank"], event["detail"]) for event in events]


def test_a_co_tenant_is_there_between_its_steps() -> None:
    replicas = Replicas()
    rehearsed = rehearsal(replicas)
    events = [details(rehearsed.after_step(step)) for step in range(1, 11)]
    assert [event for event in events if event] == [[(1, "process 77 takes 1.0 MiB")], [(1, "gave 1.0 MiB back")]]
    assert (len(events[2]), len(events[7])) == (1, 1)
    assert replicas.told == [("start", 1), ("end", 1)]


def test_it_comes_with_the_next_replica_of_its_device_where_one_is_lost() -> None:
    replicas = Replicas()
    rehearsed = rehearsal(replicas)
    del replicas.present[1]
    assert rehearsed.after_step(3) == []
    replicas.present[2] = (1, location("cpu-1"))
    assert details(rehearsed.after_step(4)) == [(1, "process 77 takes 1.0 MiB")]
    del replicas.present[2]
    assert rehearsed.after_step(5) == []
    replicas.present[3] = (1, location("cpu-1"))
    assert details(rehearsed.after_step(6)) == [(1, "process 77 takes 1.0 MiB")]
    del replicas.present[3]
    assert rehearsed.after_step(8) == []
    replicas.present[4] = (1, location("cpu-1"))
    assert rehearsed.after_step(9) == []
    assert replicas.told == [("start", 2), ("start", 3)]


@pytest.mark.parametrize(
    ("error", "said"), [(ActorDiedError(), "its process was killed"), (GetTimeoutError(), "it did not answer in time")]
)
def test_a_replica_that_dies_or_freezes_meanwhile_ends_nothing(error: RayError, said: str) -> None:
    replicas = Replicas()
    rehearsed = rehearsal(replicas)
    replicas.fails = error
    assert details(rehearsed.after_step(3)) == [(1, f"told to take 1.0 MiB: {said}")]
    assert rehearsed.after_step(4) == []
    assert details(rehearsed.after_step(8)) == [(1, f"told to give 1.0 MiB back: {said}")]


def test_one_that_takes_over_ends_what_another_one_started() -> None:
    replicas = Replicas()
    rehearsed = rehearsal(replicas)
    rehearsed.take_over(5)
    assert rehearsed.after_step(6) == []
    assert details(rehearsed.after_step(8)) == [(1, "gave 1.0 MiB back")]
    del replicas.present[1]
    rehearsed = rehearsal(replicas)
    rehearsed.take_over(5)
    assert rehearsed.after_step(8) == []


def test_a_device_without_a_replica_is_refused_at_the_start() -> None:
    check_devices([CO_TENANT], {1: location("cpu-1")})
    with pytest.raises(ConfigError, match="no replica runs on device 'cpu-1', only on cpu-0"):
        check_devices([CO_TENANT], {0: location("cpu-0")})

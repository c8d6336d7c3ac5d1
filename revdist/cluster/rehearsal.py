"""Co-tenants of a run: other processes that take memory of its devices at given steps, and give it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from ray.exceptions import RayError

from revdist.cluster.actor import Location
from revdist.cluster.failures import why
from revdist.cluster.fleet import Fleet
from revdist.cluster.records import run_event
from revdist.config import CoTenantConfig
from revdist.errors import ConfigError, format_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Seat:
    """Who started a co-tenant."""

    member: int
    rank: int
    device: str
    """Its UUID."""


@final
class Rehearsal:
    """Starts and ends the co-tenants that a configuration lists, on the hosts of their devices.

    A co-tenant ends with the replica that started it, and comes again with the next replica of its device. It waits
    for that one also where the device has none when it is due.
    """

    def __init__(
        self,
        co_tenants: Sequence[CoTenantConfig],
        fleet: Fleet,
        *,
        present: Callable[[], Mapping[int, tuple[int, Location]]],
    ) -> None:
        """present: by member, who is at work now: its rank, and where it is."""
        self._fleet = fleet
        self._present = present
        self._coming = list(co_tenants)
        self._there: list[tuple[CoTenantConfig, _Seat]] = []

    def take_over(self, step: int) -> None:
        """Go on where another one was after so many steps: its co-tenants are there, as far as replicas are."""
        for co_tenant in [one for one in self._coming if one.from_step <= step < one.to_step]:
            seat = self._seat(co_tenant)
            if seat is not None:
                self._coming.remove(co_tenant)
                self._there.append((co_tenant, seat))

    def after_step(self, step: int) -> list[dict[str, Any]]:
        """Carry out what is due once `step` steps are taken; returns the events."""
        events = []
        for entry in list(self._there):
            co_tenant, seat = entry
            if seat.member not in self._fleet.members:
                self._there.remove(entry)
                self._coming.append(co_tenant)
            elif co_tenant.to_step <= step:
                self._there.remove(entry)
                events.append(self._end(co_tenant, seat, step))
        self._coming = [one for one in self._coming if step < one.to_step]
        for co_tenant in [one for one in self._coming if one.from_step <= step]:
            newcomer = self._seat(co_tenant)
            if newcomer is not None:
                self._coming.remove(co_tenant)
                self._there.append((co_tenant, newcomer))
                events.append(self._start(co_tenant, newcomer, step))
        return events

    def _start(self, co_tenant: CoTenantConfig, seat: _Seat, step: int) -> dict[str, Any]:
        try:
            pid = self._fleet.start_co_tenant(seat.member, co_tenant)
        except RayError as error:
            return _event(seat, step, f"told to take {format_bytes(co_tenant.take)}: {why(error)}")
        return _event(seat, step, f"process {pid} takes {format_bytes(co_tenant.take)}")

    def _end(self, co_tenant: CoTenantConfig, seat: _Seat, step: int) -> dict[str, Any]:
        try:
            self._fleet.end_co_tenant(seat.member, co_tenant)
        except RayError as error:
            return _event(seat, step, f"told to give {format_bytes(co_tenant.take)} back: {why(error)}")
        return _event(seat, step, f"gave {format_bytes(co_tenant.take)} back")

    def _seat(self, co_tenant: CoTenantConfig) -> _Seat | None:
        for member, (rank, location) in self._present().items():
            if _is_on(co_tenant, location):
                return _Seat(member, rank, location.reading.uuid)
        return None


def check_devices(co_tenants: Sequence[CoTenantConfig], locations: Mapping[int, Location]) -> None:
    """Raise ConfigError where a co-tenant names a device that no replica runs on."""
    for co_tenant in co_tenants:
        if not any(_is_on(co_tenant, location) for location in locations.values()):
            names = ", ".join(location.reading.name for location in locations.values())
            raise ConfigError(f"co_tenants: no replica runs on device {co_tenant.device!r}, only on {names}")


def _is_on(co_tenant: CoTenantConfig, location: Location) -> bool:
    return location.reading.kind == "cpu" and location.reading.name == co_tenant.device


def _event(seat: _Seat, step: int, detail: str) -> dict[str, Any]:
    return run_event("co-tenant", step, detail, rank=seat.rank, device=seat.device)

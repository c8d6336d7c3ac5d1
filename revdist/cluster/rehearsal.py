"""Co-tenants of a run: other processes that take memory of its devices at given steps, and give it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from revdist.cluster.actor import Location
from revdist.cluster.fleet import Fleet
from revdist.cluster.records import run_event
from revdist.config import CoTenantConfig
from revdist.errors import ConfigError, format_bytes


@final
class Rehearsal:
    """Starts and ends the co-tenants that a configuration lists, on the hosts of their devices."""

    def __init__(self, co_tenants: Sequence[CoTenantConfig], locations: Mapping[int, Location], fleet: Fleet) -> None:
        """Raises ConfigError where a co-tenant names a device that no replica runs on."""
        self._fleet = fleet
        self._ranks = [_rank_of(co_tenant, locations) for co_tenant in co_tenants]
        self._uuids = [locations[rank].reading.uuid for rank in self._ranks]
        self._coming = list(enumerate(co_tenants))
        self._there: list[tuple[int, CoTenantConfig]] = []

    def take_over(self, step: int) -> None:
        """Go on where another one was after so many steps: its co-tenants are there."""
        there = [entry for entry in self._coming if entry[1].from_step <= step < entry[1].to_step]
        self._there.extend(there)
        self._coming = [entry for entry in self._coming if entry[1].from_step > step]

    def after_step(self, step: int) -> list[dict[str, Any]]:
        """Carry out what is due once `step` steps are taken; returns the events."""
        events = []
        for number, co_tenant in [entry for entry in self._there if entry[1].to_step <= step]:
            self._there.remove((number, co_tenant))
            self._fleet.end_co_tenant(self._ranks[number], co_tenant)
            events.append(self._event(number, step, f"gave {format_bytes(co_tenant.take)} back"))
        for number, co_tenant in [entry for entry in self._coming if entry[1].from_step <= step]:
            self._coming.remove((number, co_tenant))
            pid = self._fleet.start_co_tenant(self._ranks[number], co_tenant)
            self._there.append((number, co_tenant))
            events.append(self._event(number, step, f"process {pid} takes {format_bytes(co_tenant.take)}"))
        return events

    def _event(self, number: int, step: int, detail: str) -> dict[str, Any]:
        rank = self._ranks[number]
        return run_event("co-tenant", step, detail, rank=rank, device=self._uuids[number])


def _rank_of(co_tenant: CoTenantConfig, locations: Mapping[int, Location]) -> int:
    for rank, location in locations.items():
        if location.reading.kind == "cpu" and location.reading.name == co_tenant.device:
            return rank
    names = ", ".join(location.reading.name for location in locations.values())
    raise ConfigError(f"co_tenants: no replica runs on device {co_tenant.device!r}, only on {names}")

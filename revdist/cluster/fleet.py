"""The actors of a run: started where they were placed, watched, and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, final

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from revdist.cluster.actor import NUM_THREADS, Location, ReplicaActor
from revdist.cluster.placement import Host, Place
from revdist.config import CoTenantConfig
from revdist.training.orders import Assignment, Shares
from revdist.training.reports import LogReport, Report

_POLL_S = 5.0
"""Longest a call for reports waits in the actor: they come as soon as there are any."""

_LAST_WORDS_S = 2.0
"""Longest wait for what ranks printed at the end."""

_DEATH_S = 5.0
"""Longest wait for a killed actor to be gone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A rank's process is gone."""

    rank: int
    detail: str


def hosts() -> list[Host]:
    """Hosts of the cluster with what Ray has free on them, the driver's own first."""
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in nodes if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"]))
    return [
        Host(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in alive
    ]


@final
class Fleet:
    """One actor per rank."""

    def __init__(self, places: Sequence[Place], *, threads: int) -> None:
        self._actors = [_create(place, threads) for place in places]
        self._last = [0] * len(places)
        self._waiting: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._actors)

    def locate(self, addresses: Sequence[str]) -> list[Location]:
        """Where the actors run, with their devices open. Raises what opening a device raises."""
        calls: list[Any] = [
            actor.locate.remote(address) for actor, address in zip(self._actors, addresses, strict=True)
        ]
        return [self._get(call) for call in calls]

    def start(self, assignments: Sequence[Assignment]) -> None:
        """Let every replica live."""
        calls: list[Any] = [actor.start.remote(order) for actor, order in zip(self._actors, assignments, strict=True)]
        for rank, call in enumerate(calls):
            self._get(call)
            self._ask(rank)

    def reports(self, timeout_s: float) -> Iterator[tuple[int, list[Report] | Lost]]:
        """What ranks have to say, as soon as one has something; nothing where the time passes first."""
        if not self._waiting:
            return
        ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_s)
        for call in ready:
            rank = self._waiting.pop(call)
            try:
                self._last[rank], reports = ray.get(call)
            except RayActorError as error:
                yield rank, Lost(rank, str(error))
                continue
            yield rank, reports
            self._ask(rank)

    def dismiss(self, rank: int) -> None:
        """Ask a rank for nothing more: it has said its last word."""
        self._waiting = {call: other for call, other in self._waiting.items() if other != rank}

    def adopt(self, shares: Shares) -> None:
        """Publish a generation to every rank; they adopt it together at a step boundary."""
        for actor in self._actors:
            actor.adopt.remote(shares)

    def stop(self, reason: str) -> None:
        """Ask every rank to save and leave at the next step boundary."""
        for actor in self._actors:
            actor.stop.remote(reason)

    def start_co_tenant(self, rank: int, co_tenant: CoTenantConfig) -> int:
        """Start a co-tenant on a rank's host; returns its pid."""
        pid: int = self._get(self._actors[rank].start_co_tenant.remote(co_tenant))
        return pid

    def end_co_tenant(self, rank: int, co_tenant: CoTenantConfig) -> None:
        self._get(self._actors[rank].end_co_tenant.remote(co_tenant))

    def rest_of_logs(self) -> Iterator[tuple[int, LogReport]]:
        """What ranks have printed and not reported yet; nothing of those that do not answer."""
        calls: dict[Any, int] = {actor.rest_of_log.remote(): rank for rank, actor in enumerate(self._actors)}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_LAST_WORDS_S)
        for call in ready:
            with contextlib.suppress(RayActorError, RayTaskError):
                report = ray.get(call)
                if report is not None:
                    yield calls[call], report

    def kill(self) -> None:
        """End every actor, and what it started, and wait until they are gone."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._waiting.clear()
        for actor in self._actors:
            with contextlib.suppress(RayActorError, GetTimeoutError):
                ray.get(actor.status.remote(), timeout=_DEATH_S)

    def _ask(self, rank: int) -> None:
        self._waiting[self._actors[rank].reports.remote(self._last[rank], _POLL_S)] = rank

    @staticmethod
    def _get(call: Any) -> Any:
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise error.cause from None


def _create(place: Place, threads: int) -> Any:
    environment = {name: value for name, value in os.environ.items() if name.startswith("REVDIST_")}
    options = ray.remote(ReplicaActor).options(
        num_cpus=threads,
        num_gpus=1 if place.spec.kind == "cuda" else 0,
        max_concurrency=NUM_THREADS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
    )
    return options.remote(place.rank, place.spec, environment, [path for path in sys.path if path])

"""The actors of a run: started where they were placed, watched, and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, final

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from revdist.cluster.actor import NUM_THREADS, Location, ReplicaActor
from revdist.cluster.errands import Errands
from revdist.cluster.inventory import uuids
from revdist.cluster.placement import Host, Place
from revdist.config import CoTenantConfig
from revdist.training.orders import Assignment, Regroup, Shares
from revdist.training.reports import LogReport, Report

_LOOK_S = 0.2
"""Pause between looks at anything else while an actor starts."""
_POLL_S = 5.0
"""Longest a call for reports waits in the actor: they come as soon as there are any."""

_CO_TENANT_S = 5.0
"""Longest wait for a replica to start or end a co-tenant: nothing is supervised meanwhile."""
_LAST_WORDS_S = 2.0
"""Longest wait for what ranks printed at the end."""

NAMESPACE = "revdist"
"""Ray namespace of the actors that outlive their driver."""
ORPHAN_S = "REVDIST_ORPHAN_S"
"""Variable: seconds for which replicas of a detached run train on without a supervisor before they save and leave."""
_ORPHAN_S = 150.0
"""NFS lets go of a dead host's locks 90 s later, and a deputy waits for that of the run directory."""

_GREETINGS = 8
"""In the time for which actors wait for a supervisor."""
_DEATH_S = 5.0
"""Longest wait for killed actors to be gone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A replica's process is gone, or does not answer."""

    rank: int
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """An actor of a run, and where it is."""

    actor: Any
    address: str
    """Of its host."""


def hosts(group: PlacementGroup | None = None) -> list[Host]:
    """Hosts of the cluster with what Ray has free on them, the driver's own first.

    group: only the bundles of this placement group count, each as a host of its own.
    """
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in nodes if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"]))
    parts = [(node, -1, "") for node in alive] if group is None else _bundles(group, alive)
    return [
        Host(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=free.get(node["NodeID"], {}).get(f"CPU{suffix}", 0.0),
            gpus=free.get(node["NodeID"], {}).get(f"GPU{suffix}", 0.0),
            bundle=bundle,
        )
        for node, bundle, suffix in parts
    ]


def _bundles(group: PlacementGroup, nodes: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int, str]]:
    """Per bundle: its node, its number, and how the names of its resources end."""
    where: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return [
        (node, bundle, f"_group_{bundle}_{group.id.hex()}")
        for node in nodes
        for bundle, node_id in sorted(where.items())
        if node_id == node["NodeID"]
    ]


@dataclasses.dataclass(slots=True)
class _Heart:
    """When a member was heard and asked last, and the question it has not answered yet."""

    heard_s: float
    asked_s: float
    question: Any = None


@final
class Fleet:
    """The actors of a run by member number: one per replica, those that were lost left out."""

    def __init__(
        self,
        places: Sequence[Place],
        *,
        threads: int,
        run_id: str | None = None,
        placement_group: PlacementGroup | None = None,
        by_uuid: bool = False,
    ) -> None:
        """run_id: given, the actors outlive this process, and are found again by it.
        placement_group: whose bundles the places name.
        by_uuid: devices are told apart by UUID, so hosts have to be asked for theirs.
        """
        self._threads = threads
        self._by_uuid = by_uuid
        self._uuids: dict[str, frozenset[str]] = {}
        self._placement_group = placement_group
        self._run_id = run_id
        self._known: dict[int, Known] = {}
        self._last: dict[int, int] = {}
        self._waiting: dict[Any, int] = {}
        self._dismissed: set[int] = set()
        self._hearts: dict[int, _Heart] = {}
        self._next = 0
        self._looked_s = time.monotonic()
        self._greeted_s = time.monotonic()
        self._heartbeat_s = 0.0
        self._errands = Errands()
        for place in places:
            self.add(place)

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(self._known)

    @property
    def known(self) -> dict[int, Known]:
        """The actors of all members. May be asked from any thread."""
        return dict(self._known)

    def add(self, place: Place) -> int:
        """Start another actor; returns its member number at once."""
        member, self._next = self._next, self._next + 1
        name = None if self._run_id is None else f"{self._run_id}-{member}"
        actor = _create(place, self._threads, name, self._placement_group)
        self._known[member] = Known(actor, place.address)
        self._last[member] = 0
        return member

    def take_over(self, known: Mapping[int, Known], *, next_member: int) -> None:
        """Supervise actors that another process started. They report what has not been acknowledged."""
        self._next = next_member
        self._known.update(known)
        for member in known:
            self._last[member] = 0
            self._ask(member)

    def free_hosts(self) -> list[Host]:
        """Where the run may start further actors, with what is free there."""
        found = hosts(self._placement_group)
        if not self._by_uuid or len({host.node_id for host in found}) == 1:
            return found
        self._uuids |= uuids([host for host in found if host.node_id not in self._uuids])
        return [dataclasses.replace(host, uuids=self._uuids.get(host.node_id, frozenset())) for host in found]

    def look_for_hosts(self) -> Future[list[Host]]:
        """As `free_hosts`, without waiting for the Ray head."""
        return self._errands.send(self.free_hosts)

    def locate(self, addresses: Mapping[int, str], *, look: Callable[[], None] = lambda: None) -> list[Location]:
        """Where actors run, with their devices open.

        look: called now and then meanwhile, since an actor whose host is in trouble may never answer.

        Raises what opening a device raises, and what `look` raises.
        """
        calls = [self.find(member, address) for member, address in addresses.items()]
        for call in calls:
            while not ray.wait([call], timeout=_LOOK_S)[0]:
                look()
                self._greet()
        return [self.get(call) for call in calls]

    def locate_soon(self, addresses: Mapping[int, str], *, timeout_s: float) -> dict[int, Location]:
        """As `locate`, of those actors alone that answer in time and can open their device."""
        calls = {self.find(member, address): member for member, address in addresses.items()}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
        located = {}
        for call in ready:
            with contextlib.suppress(Exception):  # whatever its process raised: a host may lack anything
                located[calls[call]] = self.get(call)
        return {member: located[member] for member in addresses if member in located}

    def find(self, member: int, address: str) -> Any:
        """Ask an actor where it runs, once its device is open; the answer comes with `get`."""
        return self._known[member].actor.locate.remote(address)

    def start(self, assignments: Mapping[int, Assignment]) -> None:
        """Let replicas live."""
        calls: list[Any] = [self._known[member].actor.start.remote(order) for member, order in assignments.items()]
        for member, call in zip(assignments, calls, strict=True):
            self.get(call)
            self._ask(member)

    def reports(self, timeout_s: float) -> Iterator[tuple[int, list[Report] | Lost]]:
        """What members have to say, as soon as one has something; nothing where the time passes first."""
        self._greet()
        if not self._waiting:
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=timeout_s)
        for call in ready:
            member = self._waiting.pop(call)
            if member not in self._known:
                continue
            try:
                self._last[member], reports = ray.get(call)
            except RayTaskError:  # it is alive, and `reports` itself is at fault
                raise
            except RayError as error:  # not RayActorError alone: Ray's memory monitor says OutOfMemoryError
                yield member, Lost(member, str(error))
                continue
            self._hear(member)
            yield member, reports
            self._ask(member)

    def silent(self, members: Collection[int], heartbeat_s: float) -> list[int]:
        """Those members that have not answered for `heartbeat_s`. To be called several times in that time."""
        now_s = time.monotonic()
        held_up = now_s - self._looked_s > heartbeat_s / 2  # this process was, itself, and heard nobody
        if held_up or heartbeat_s != self._heartbeat_s:  # they were not asked often enough for another one
            self._hearts.clear()
        self._looked_s, self._heartbeat_s = now_s, heartbeat_s
        for member in list(self._hearts):
            if member not in members:
                del self._hearts[member]
        for member in members:
            if member not in self._hearts:
                self._hearts[member] = _Heart(heard_s=now_s, asked_s=0.0)
        self._listen(now_s, every_s=heartbeat_s / 8)
        return [member for member, heart in self._hearts.items() if now_s - heart.heard_s > heartbeat_s]

    def dismiss(self, member: int) -> None:
        """Ask a member for nothing more: it has said its last word."""
        self._dismissed.add(member)
        self._waiting = {call: other for call, other in self._waiting.items() if other != member}

    def adopt(self, shares: Shares, members: Sequence[int]) -> None:
        """Publish a generation to the members of the group; they adopt it together at a step boundary."""
        for member in members:
            self._known[member].actor.adopt.remote(shares)

    def regroup(self, orders: Mapping[int, Regroup]) -> None:
        """Let members form another group."""
        for member, order in orders.items():
            self._known[member].actor.regroup.remote(order)

    def stop(self, reason: str) -> None:
        """Ask every member to save and leave at the next step boundary."""
        for one in self._known.values():
            one.actor.stop.remote(reason)

    def start_co_tenant(self, member: int, co_tenant: CoTenantConfig) -> int:
        """Start a co-tenant on a member's host; returns its pid. Raises RayError where it does not answer in time."""
        call = self._known[member].actor.start_co_tenant.remote(co_tenant)
        pid: int = self.get(call, timeout_s=_CO_TENANT_S)
        return pid

    def end_co_tenant(self, member: int, co_tenant: CoTenantConfig) -> None:
        """Let a co-tenant give its memory back; it has, where the member that started it is lost.

        Raises RayError where that member does not answer in time.
        """
        if member in self._known:
            self.get(self._known[member].actor.end_co_tenant.remote(co_tenant), timeout_s=_CO_TENANT_S)

    def forget(self, member: int) -> None:
        """End a member's actor, which need not answer any more, and do without it."""
        one = self._known.pop(member, None)
        self._hearts.pop(member, None)
        self.dismiss(member)
        if one is not None:
            self._errands.send(lambda: ray.kill(one.actor, no_restart=True))

    def rest_of_logs(self, newest: Mapping[int, LogReport]) -> Iterator[tuple[int, LogReport]]:
        """What members have printed since their newest report; nothing of those that do not answer."""
        calls: dict[Any, int] = {
            self._known[member].actor.rest_of_log.remote(report): member
            for member, report in newest.items()
            if member in self._known
        }
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_LAST_WORDS_S) if calls else ([], [])
        for call in ready:
            with contextlib.suppress(RayError):
                yield calls[call], ray.get(call)

    def kill(self) -> None:
        """End every actor, and what it started, and wait until they are gone."""
        self._errands.wait(_DEATH_S)
        actors = [one.actor for one in self._known.values()]
        for actor in actors:
            ray.kill(actor, no_restart=True)
        self._waiting.clear()
        self._known.clear()
        calls = [actor.answer.remote() for actor in actors]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=_DEATH_S)  # each fails once its actor is gone

    @staticmethod
    def get(call: Any, *, timeout_s: float | None = None) -> Any:
        """The answer to a call. Raises what it raised in the actor, and GetTimeoutError where that takes longer."""
        try:
            return ray.get(call, timeout=timeout_s)
        except RayTaskError as error:
            raise error.cause from None

    @staticmethod
    def has_come(call: Any) -> bool:
        """Whether the answer to a call, or its failure, is there."""
        return bool(ray.wait([call], timeout=0)[0])

    def _ask(self, member: int) -> None:
        if member in self._known and member not in self._dismissed:
            self._waiting[self._known[member].actor.reports.remote(self._last[member], _POLL_S)] = member

    def _greet(self) -> None:
        """Let actors that outlive this process know now and then that it is there, also those asked for nothing."""
        now_s = time.monotonic()
        if self._run_id is not None and now_s - self._greeted_s > orphan_s() / _GREETINGS:
            self._greeted_s = now_s
            for one in self._known.values():
                one.actor.answer.remote()

    def _hear(self, member: int) -> None:
        if member in self._hearts:
            self._hearts[member].heard_s = time.monotonic()

    def _listen(self, now_s: float, *, every_s: float) -> None:
        """Take the answers that have come, and ask who has been neither asked nor heard for a while."""
        questions = {heart.question: heart for heart in self._hearts.values() if heart.question is not None}
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=0) if questions else ([], [])
        for question in answered:
            heart = questions[question]
            heart.question = None
            with contextlib.suppress(RayError):  # that it died is said where its reports are asked for
                ray.get(question)
                heart.heard_s = max(heart.heard_s, now_s)
        for member, heart in self._hearts.items():
            if heart.question is None and now_s - max(heart.asked_s, heart.heard_s) >= every_s:
                heart.asked_s, heart.question = now_s, self._known[member].actor.answer.remote()


def settings() -> dict[str, str]:
    """The driver's settings, which every process of the run shares."""
    return {name: value for name, value in os.environ.items() if name.startswith("REVDIST_")}


def module_paths() -> list[str]:
    """Where the driver finds modules, for every process of the run."""
    return [path for path in sys.path if path]


def orphan_s() -> float:
    """Seconds for which a process of a detached run waits for a supervisor before it leaves."""
    return float(os.environ.get(ORPHAN_S, _ORPHAN_S))


def _create(place: Place, threads: int, name: str | None, group: PlacementGroup | None) -> Any:
    options: dict[str, Any] = {
        "num_cpus": threads,
        "num_gpus": 1 if place.spec.kind == "cuda" else 0,
        "max_concurrency": NUM_THREADS,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        if group is None
        else PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place.bundle),
    }
    if name is not None:
        options |= {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}
    return (
        ray.remote(ReplicaActor)
        .options(**options)
        .remote(place, settings(), module_paths(), None if name is None else orphan_s())
    )

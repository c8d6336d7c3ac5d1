"""A supervisor's death and the next one: replicas that outlive their driver, found and supervised again.

The actors of a detached run have names and belong to nobody, so they train on when their driver is
gone. What a supervisor knows, each of them can tell again. Where none comes back, they save and leave
by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from revdist.cluster.actor import Standing
from revdist.cluster.crew import Crew
from revdist.cluster.fleet import NAMESPACE, Fleet, Known
from revdist.cluster.groups import Groups, new_prefix
from revdist.cluster.local import Addresses

_ANSWER_S = 10.0
"""Longest wait for the first replica that answers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Heritage:
    """What a deputy knows of a run that it takes over: it need not ask the Ray head, which may be lost too."""

    known: Mapping[int, Known]
    lost: frozenset[int]
    """Those of them that were on a host that is lost."""
    addresses: Addresses
    """As they are on the deputy's host."""


def find(
    run_id: str, *, threads: int, heartbeat_s: float, heritage: Heritage | None = None, by_uuid: bool = False
) -> Crew | None:
    """The replicas of a run that are alive in the connected cluster; None where there are none.

    Those that had not joined yet, and those that do not answer within `heartbeat_s` of the first, are ended.
    heritage: what is known of them already; None: the Ray head is asked. by_uuid: as `Fleet`.
    """
    known = {m: Known(actor, "") for m, actor in _actors(run_id).items()} if heritage is None else heritage.known
    lost = frozenset[int]() if heritage is None else heritage.lost
    calls = {member: one.actor.standing.remote() for member, one in known.items() if member not in lost}
    if not calls:
        return None
    _, silent = ray.wait(list(calls.values()), num_returns=1, timeout=_ANSWER_S)
    if silent:
        ray.wait(silent, num_returns=len(silent), timeout=heartbeat_s)
    standings = {}
    for member, call in calls.items():
        standing = _answer(call)
        if standing is not None and standing.shares is not None:
            standings[member] = standing
    if not standings:
        for one in known.values():
            ray.kill(one.actor)
        return None
    fleet = Fleet((), threads=threads, run_id=run_id, by_uuid=by_uuid)
    places = {member: standing.place for member, standing in standings.items()}
    placed = {m: Known(known[m].actor, place.address) for m, place in places.items()}
    fleet.take_over({**known, **placed}, next_member=max(known) + 1)
    for member in known.keys() - standings.keys():
        fleet.forget(member)
    newest = max(standing.group for standing in standings.values())
    by_rank = {standing.rank: member for member, standing in standings.items() if standing.group == newest}
    world_size = max(standings[member].world_size for member in by_rank.values())
    return Crew(
        fleet=fleet,
        groups=Groups.taken_over(new_prefix(), newest, tuple(by_rank.get(rank) for rank in range(world_size))),
        locations={member: standing.location for member, standing in standings.items()},
        places=places,
        standings=standings,
    )


def next_member(run_id: str) -> int:
    """A number that no replica of a run has, dying ones included."""
    return max(_actors(run_id), default=-1) + 1


def end(run_id: str) -> int:
    """Kill what outlived the driver of a run, in the connected cluster; returns how many replicas there were."""
    for deputy in _named(deputy_name(run_id, "")).values():  # before it takes over
        ray.kill(deputy)
    actors = _actors(run_id)
    for actor in actors.values():
        ray.kill(actor)
    return len(actors)


def deputy_name(run_id: str, node_id: str) -> str:
    """Of the actor that stands by for a run on a node of the cluster."""
    return f"deputy-{run_id}-{node_id[:12]}"


def _actors(run_id: str) -> dict[int, Any]:
    """By member number."""
    return {int(rest): actor for rest, actor in _named(f"{run_id}-").items()}


def _named(prefix: str) -> dict[str, Any]:
    """Actors that outlive their drivers, by what follows `prefix` in their names."""
    listed: Sequence[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in listed if one["namespace"] == NAMESPACE and one["name"].startswith(prefix)]
    found = {}
    for name in names:
        with contextlib.suppress(ValueError):  # it has died since it was listed
            found[name.removeprefix(prefix)] = ray.get_actor(name, namespace=NAMESPACE)
    return found


def _answer(call: Any) -> Standing | None:
    try:
        answer: Standing | None = ray.get(call, timeout=0)
    except RayError:  # it is lost, silent, or cannot say
        return None
    return answer

"""A supervisor's death and the next one: replicas that outlive their driver, found and supervised again.

The actors of a detached run have names and belong to nobody, so they train on when their driver is
gone. What a supervisor knows, each of them can tell again. Where none comes back, they save and leave
by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from revdist.cluster.actor import Standing
from revdist.cluster.crew import Crew
from revdist.cluster.fleet import NAMESPACE, Fleet
from revdist.cluster.groups import Groups, new_prefix

_ANSWER_S = 10.0
"""Longest wait for the first replica that answers."""


def find(run_id: str, *, threads: int, heartbeat_s: float) -> Crew | None:
    """The replicas of a run that are alive in the connected cluster; None where there are none.

    Those that had not joined yet, and those that do not answer within `heartbeat_s` of the first, are ended.
    """
    actors = _actors(run_id)
    calls = {member: actor.standing.remote() for member, actor in actors.items()}
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
        else:
            ray.kill(actors[member])
    if not standings:
        return None
    fleet = Fleet((), threads=threads, run_id=run_id)
    fleet.take_over({member: actors[member] for member in standings}, next_member=max(actors) + 1)
    newest = max(standing.group for standing in standings.values())
    by_rank = {standing.rank: member for member, standing in standings.items() if standing.group == newest}
    world_size = max(standings[member].world_size for member in by_rank.values())
    return Crew(
        fleet=fleet,
        groups=Groups.taken_over(new_prefix(), newest, tuple(by_rank.get(rank) for rank in range(world_size))),
        locations={member: standing.location for member, standing in standings.items()},
        places={member: standing.place for member, standing in standings.items()},
        standings=standings,
    )


def next_member(run_id: str) -> int:
    """A number that no replica of a run has, dying ones included."""
    return max(_actors(run_id), default=-1) + 1


def end(run_id: str) -> int:
    """Kill the replicas of a run that outlived its driver, in the connected cluster; returns how many there were."""
    actors = _actors(run_id)
    for actor in actors.values():
        ray.kill(actor)
    return len(actors)


def _actors(run_id: str) -> dict[int, Any]:
    prefix = f"{run_id}-"
    listed: Sequence[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in listed if one["namespace"] == NAMESPACE and one["name"].startswith(prefix)]
    found = {}
    for name in names:
        try:
            found[int(name.removeprefix(prefix))] = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:  # it has died since it was listed
            continue
    return found


def _answer(call: Any) -> Standing | None:
    try:
        answer: Standing = ray.get(call, timeout=0)
    except (RayActorError, GetTimeoutError):
        return None
    return answer

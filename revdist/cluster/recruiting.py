"""Bringing devices into a run under way: those that were lost and are back, and those that join the cluster.

A newcomer starts, builds the model and measures its device beside the run, which does not wait. Once it
has reported its step-time curve it is ready, and joins at a step boundary. Where several devices are free,
as after a host is back, their newcomers prepare beside each other.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, final

from revdist.cluster.actor import Location
from revdist.cluster.failures import why
from revdist.cluster.fleet import Fleet
from revdist.cluster.placement import Host, Place, is_like, missing, place_another
from revdist.config import RunConfig
from revdist.training.orders import Assignment

_LOOK_S = 1.0
"""Seconds between looks for a free device."""
_BACKOFF_S = (2.0, 5.0, 15.0, 60.0)
"""Pauses after a newcomer that failed before it joined: its device may need time."""
_ANSWER_S = 20.0
"""Longest wait for a newcomer's process: Ray takes a minute to find out that a host is gone."""
_SHUN_S = 120.0
"""Time for which other hosts are tried after one did not answer."""


@dataclasses.dataclass(slots=True)
class _Newcomer:
    place: Place
    found: Any
    """Answer to the question where it runs, as it comes."""
    asked_s: float
    location: Location | None = None
    ready: bool = False


@final
class Recruiter:
    """Finds and prepares newcomers."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        places: Mapping[int, Place],
        *,
        assign: Callable[[], Assignment],
        tell: Callable[[str], None],
        restarts: int = 0,
    ) -> None:
        """places: of the members that the run started with. assign: what a newcomer is to do.
        tell: called with a line about a newcomer that could not be used.
        restarts: of those that `workers.max_restarts` allows, how many are used up.
        """
        self._config = config
        self._fleet = fleet
        self._places = dict(places)
        self._assign = assign
        self._tell = tell
        listed = () if config.devices == "auto" else config.devices
        # Where another supervisor led the run so far, or all began again, devices may be missing already.
        absent = missing(listed, tuple(places.values()))
        self._lost = [Place(rank=-1, node_id="", address="", spec=spec) for spec in absent]
        self._restarts = restarts
        self._is_restarting = False
        """Whether the last restart is on its way: nobody of it is ready or has failed."""
        self._failed = 0
        self._newcomers: dict[int, _Newcomer] = {}
        self._next_look_s = 0.0
        self._looking: Future[list[Host]] | None = None
        self._shunned_until_s: dict[str, float] = {}
        """By node."""

    @property
    def most_members(self) -> int:
        """Replicas that the run may have."""
        limits = [self._config.global_batch]
        if self._config.workers.max is not None:
            limits.append(self._config.workers.max)
        if self._config.devices != "auto":
            limits.append(len(self._config.devices))
        return min(limits)

    @property
    def restarts(self) -> int:
        """Times that lost members were replaced, and what the run used up before; not the one that is on its way.

        Members that are replaced together, as those of a host that is back, count once.
        """
        return self._restarts - self._is_restarting

    def lose(self, member: int) -> bool:
        """A member is lost; whether it will be replaced where a device is found."""
        self._lost.append(self._places.pop(member))
        self._next_look_s = time.monotonic() + _LOOK_S
        return self._may_replace

    def is_newcomer(self, member: int) -> bool:
        return member in self._newcomers

    def fail(self, member: int, why: str) -> None:
        """A newcomer, or one that was ready but could not join, is of no use: try again later."""
        self._newcomers.pop(member, None)
        self._is_restarting = False
        place = self._places.pop(member)
        self._lost.append(place)
        self._fleet.forget(member)
        pause_s = _BACKOFF_S[min(self._failed, len(_BACKOFF_S) - 1)]
        if not self._newcomers:  # one try, of however many
            self._failed += 1
        self._next_look_s = time.monotonic() + pause_s
        self._tell(f"{place.spec.name or 'a device'} on {place.address} did not join: {why}")

    def is_ready(self, member: int) -> None:
        """A newcomer has reported its curve."""
        self._newcomers[member].ready = True
        self._is_restarting = False

    def advance(self) -> dict[int, Location]:
        """Do what can be done without waiting; returns newcomers that are ready, and are so no more."""
        for member, newcomer in list(self._newcomers.items()):
            if newcomer.location is None and self._fleet.has_come(newcomer.found):
                self._start(member, newcomer)
            elif newcomer.location is None and time.monotonic() > newcomer.asked_s + _ANSWER_S:
                self._shunned_until_s[newcomer.place.node_id] = time.monotonic() + _SHUN_S
                self.fail(member, f"its host did not answer for {_ANSWER_S:.0f} s")
        if not self._newcomers:
            self._look()
        ready = {m: n.location for m, n in self._newcomers.items() if n.ready and n.location is not None}
        for member in ready:
            del self._newcomers[member]
        return ready

    def _look(self) -> None:
        """Ask for hosts with room once in a while, and use what was found, whenever that comes."""
        if len(self._places) >= self.most_members or not self._may_look:
            return
        if self._looking is None and time.monotonic() >= self._next_look_s:
            self._looking = self._fleet.look_for_hosts()
        if self._looking is None or not self._looking.done():
            return
        looked, self._looking = self._looking, None
        self._next_look_s = max(self._next_look_s, time.monotonic() + _LOOK_S)
        if looked.exception() is None:  # else the Ray head is away: ask again later
            self._recruit(looked.result())

    def _recruit(self, hosts: Sequence[Host]) -> None:
        """Start a newcomer on every device that is free."""
        now_s = time.monotonic()
        room = [one for one in hosts if self._shunned_until_s.get(one.node_id, now_s) <= now_s]
        may_replace, num_lost = self._may_replace, len(self._lost)
        while len(self._places) < self.most_members:
            taken = tuple(self._places.values())
            place = place_another(self._config, room, taken, self._lost, rank=-1, replace=may_replace)
            if place is None:
                break
            room = [host.without(place, threads=self._config.threads_per_worker) for host in room]
            if may_replace:
                self._replace(place)
            member = self._fleet.add(place)
            self._places[member] = place
            found = self._fleet.find(member, place.address)
            self._newcomers[member] = _Newcomer(place, found, now_s)
        if len(self._lost) < num_lost:
            self._restarts += 1
            self._is_restarting = True

    def _replace(self, place: Place) -> None:
        """Strike out who was lost, where a newcomer is placed in its stead."""
        like = [one for one in self._lost if is_like(place.spec, one.spec)]
        if like:
            self._lost.remove(min(like, key=lambda one: (one.spec != place.spec, one.node_id != place.node_id)))

    @property
    def _may_replace(self) -> bool:
        return self._restarts < self._config.workers.max_restarts

    @property
    def _may_look(self) -> bool:
        """Whether a look can find anything: asking the cluster is not free."""
        return (bool(self._lost) and self._may_replace) or self._config.devices == "auto"

    def _start(self, member: int, newcomer: _Newcomer) -> None:
        assignment = self._assign()
        try:
            newcomer.location = self._fleet.get(newcomer.found)
            self._fleet.start({member: assignment})
        except Exception as error:  # whatever its process raised: a host that joins may lack anything
            self.fail(member, why(error))

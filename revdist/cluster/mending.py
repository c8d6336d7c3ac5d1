"""Keeping a run's group whole: who is lost leaves it, who is ready joins it, and what broke is formed anew."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, final

from revdist.cluster.actor import Location
from revdist.cluster.crew import Crew
from revdist.cluster.failures import Failure, describe, is_survivable, what_failed
from revdist.cluster.fleet import Lost
from revdist.cluster.processes import Process
from revdist.cluster.records import device_records, run_event
from revdist.cluster.recruiting import Recruiter
from revdist.cluster.shares import ShareKeeper
from revdist.config import RunConfig
from revdist.devices.reading import Reading
from revdist.training.orders import Assignment
from revdist.training.reports import BrokenReport, StepReport

_SETTLE_S = 1.0
"""Beyond the heartbeat: where a group broke and nobody was found to be lost by then, nobody is."""
_JOIN_TRIES = 2
"""Groups that a newcomer may fail to connect to, with nobody lost, before it is let go."""


@final
class Mender:
    """Orders the groups of one run."""

    def __init__(
        self,
        config: RunConfig,
        crew: Crew,
        keeper: ShareKeeper,
        *,
        assign: Callable[[], Assignment],
        event: Callable[[dict[str, Any]], None],
        restarts: int = 0,
    ) -> None:
        """assign: what a newcomer is to do. event: told what happens. restarts: as `Recruiter`."""
        self._config = config
        self._fleet = crew.fleet
        self._groups = crew.groups
        self._keeper = keeper
        self._event = event
        self._locations: dict[int, Location] = {}
        self._here: dict[int, Process] = {}
        """Members whose processes this one can see."""
        self._meet(crew.locations)
        self._recruiter = Recruiter(config, crew.fleet, crew.places, assign=assign, tell=self._tell, restarts=restarts)
        self._new: dict[int, Failure] = {}
        self._lost: set[int] = set()
        self._joining: list[int] = []
        """Newcomers that are ready, and wait for the group before theirs."""
        self._failed_joins: Counter[int] = Counter()
        """By newcomer."""
        self._broken_s: float | None = None
        self._broke_at_work = False
        self._is_orderly = False
        """Whether members were ordered to train on until the newest group is connected."""
        self._step = 0

    @property
    def left(self) -> list[int]:
        """Members of the group that are not known to be lost, in rank order."""
        return [member for member in self._groups.members if member not in self._lost and member not in self._new]

    @property
    def holding(self) -> list[int]:
        """Those of them that hold the state of training."""
        return [member for member in self._groups.working if member not in self._lost and member not in self._new]

    @property
    def present(self) -> dict[int, tuple[int, Location]]:
        """The ranks of those, and where they are."""
        return {member: (self._groups.rank_of(member), self._locations[member]) for member in self.holding}

    @property
    def failures(self) -> dict[int, Failure]:
        """What happened to members since the group was last mended."""
        return dict(self._new)

    @property
    def restarts(self) -> int:
        """Replacements of lost members, and starts of all of them, so far."""
        return self._recruiter.restarts

    @property
    def readings(self) -> list[Reading]:
        """The devices of the group, in rank order."""
        return self._readings(self._groups.members)

    def location(self, member: int) -> Location:
        return self._locations[member]

    def take_failure(self, member: int, failure: Failure, *, ended: Collection[int]) -> None:
        """A member, or a newcomer, is lost. ended: members that have come to their end, whose loss is none."""
        if self._recruiter.is_newcomer(member) or member in self._joining:
            self._joining = [other for other in self._joining if other != member]
            self._recruiter.fail(member, what_failed(failure))
        elif member in self._groups.members and member not in ended and member not in self._lost:
            self._new.setdefault(member, dataclasses.replace(failure, rank=self._groups.rank_of(member)))

    def take_broken(self, report: BrokenReport) -> None:
        """A rank's group broke: if nobody turns out to be lost, the same ranks form another one."""
        self._broke_at_work = self._broke_at_work or report.group == self._groups.number_at_work
        if report.group == self._groups.number and self._broken_s is None:
            self._broken_s = time.monotonic()

    def take_curve(self, member: int) -> None:
        """A member has reported its curve: a newcomer that has one is ready."""
        if self._recruiter.is_newcomer(member):
            self._recruiter.is_ready(member)

    def take_step(self, report: StepReport) -> list[Reading] | None:
        """A step was taken. The devices of the group where it is its first, else None."""
        self._step = report.step
        before = self._groups.working
        if not self._groups.entered(report.group):
            return None
        now = self._groups.working
        for member in now:
            if member not in before:
                self._event(self._joined(member, rank=now.index(member)))
        divided = " + ".join(str(row.share) for row in report.rows)
        detail = f"{len(now)} replicas, shares {divided}, {report.pause_s:.2f} s of pause"
        devices = device_records(self._readings(now))
        facts = {"group": report.group, "pause_s": report.pause_s, "devices": devices}
        self._event(run_event("regroup", report.step - 1, detail, **facts))
        return self._readings(now)

    def find_silent(self, ended: Collection[int], heartbeat_s: float) -> None:
        """Count members that do not answer for so long as lost. ended: as `take_failure`."""
        watched = [member for member in self.left if member not in ended]
        for member in self._fleet.silent(watched, heartbeat_s):
            self.take_failure(member, Lost(member, f"it did not answer for {heartbeat_s:.1f} s"), ended=ended)

    def find_dead(self, ended: Collection[int]) -> None:
        """Where one is lost, count those as lost too whose processes on this host are gone.

        Ray tells of several deaths one by one, up to a second apart.
        """
        for member in self.left if self._new else ():
            if member in self._here and not self._here[member].alive:
                self.take_failure(member, Lost(member, "its process is gone, as after SIGKILL"), ended=ended)

    def is_beyond_mending(self) -> bool:
        """Whether failures are of a kind that all ranks meet alike, or too few members are left."""
        if not self._new:
            return False
        enough = self.holding and len(self.left) >= self._config.workers.min
        return not enough or not all(is_survivable(failure) for failure in self._new.values())

    def give_up(self, *, then: str) -> None:
        """Nothing is left to mend: say who is lost. then: what happens now."""
        for member, failure in self._new.items():
            self._tell_lost(member, failure, then)
        self._new.clear()

    def mend(self, ended: Collection[int]) -> None:
        """Let the members that are left form another group where some are lost, or where theirs broke."""
        for member, failure in self._new.items():
            self._lose(member, failure)
        settled_s = self._config.faults.heartbeat_s + _SETTLE_S
        is_broken = self._broken_s is not None and time.monotonic() - self._broken_s > settled_s
        if is_broken and not self._new and self._is_orderly and not self._broke_at_work:
            self._join_again(ended)
        elif self._new or is_broken:
            self._new.clear()
            left = [member for member in self.left if member not in ended]
            if any(member in self.holding for member in left):  # newcomers alone would begin from nothing
                self.regroup(left, reason="lost", orderly=False)

    def grow(self) -> None:
        """Let newcomers that are ready join, once the group has settled."""
        ready = self._recruiter.advance()
        self._meet(ready)
        self._joining.extend(ready)
        if self._joining and not self._groups.pending and not self._new:
            joining, self._joining = self._joining, []
            self.regroup([*self._groups.members, *joining], reason="joined", orderly=True)

    def regroup(self, members: Sequence[int], *, reason: str, orderly: bool) -> None:
        """Order members to form the next group, with shares for it."""
        self._broken_s, self._broke_at_work, self._is_orderly = None, False, orderly
        shares = self._keeper.regroup(members, reason=reason)
        locations = [self._locations[member] for member in members]
        self._fleet.regroup(self._groups.order(members, locations, shares, orderly=orderly))

    def _join_again(self, ended: Collection[int]) -> None:
        """Training goes on, but the group with newcomers could not be connected: try it once more, or without them."""
        for member in self._groups.members:
            if member not in self._groups.working and member not in self._lost:
                self._failed_joins[member] += 1
                if self._failed_joins[member] >= _JOIN_TRIES:
                    self._lost.add(member)
                    self._recruiter.fail(member, f"it could not be connected to the others in {_JOIN_TRIES} tries")
        left = [member for member in self.left if member not in ended]
        self.regroup(left, reason="joined", orderly=True)

    def _meet(self, locations: Mapping[int, Location]) -> None:
        self._locations.update(locations)
        for member, location in locations.items():
            if location.process.alive:
                self._here[member] = location.process

    def _readings(self, members: Sequence[int]) -> list[Reading]:
        return [self._locations[member].reading for member in members]

    def _lose(self, member: int, failure: Failure) -> None:
        self._lost.add(member)
        replaced = self._recruiter.lose(member)
        then = "once a device is free, it is replaced" if replaced else "it is not replaced: see workers.max_restarts"
        self._tell_lost(member, failure, f"the others go on; {then}")
        self._fleet.forget(member)

    def _tell_lost(self, member: int, failure: Failure, then: str) -> None:
        location = self._locations[member]
        detail = f"{describe(failure, location)}; {then}"
        self._event(run_event("lost", self._step, detail, rank=failure.rank, device=location.reading.uuid))

    def _joined(self, member: int, *, rank: int) -> dict[str, Any]:
        location = self._locations[member]
        where = f"{location.reading.name} on {location.host}, process {location.pid}"
        facts = {"rank": rank, "device": location.reading.uuid, "restarts": self.restarts}
        return run_event("joined", self._step - 1, where, **facts)

    def _tell(self, trouble: str) -> None:
        self._event(run_event("lost", self._step, trouble, restarts=self.restarts))

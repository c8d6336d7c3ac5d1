"""What a supervisor takes charge of: the actors of a run, where they are, and how far they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Self

from revdist.cluster.actor import Location, Standing
from revdist.cluster.fleet import Fleet
from revdist.cluster.groups import Groups, new_prefix
from revdist.cluster.placement import Place
from revdist.training.orders import Assignment, Rendezvous, Shares

Assign = Callable[[int, Rendezvous], Assignment]
"""What a replica is to do, given how many there shall be and where it meets the others."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The members of a run, by number."""

    fleet: Fleet
    groups: Groups
    """With the newest one formed, or ordered."""
    locations: Mapping[int, Location]
    places: Mapping[int, Place]
    standings: Mapping[int, Standing] = dataclasses.field(default_factory=dict)
    """What members have told that another supervisor led so far; empty for those that start now."""

    @classmethod
    def at_work(
        cls, fleet: Fleet, places: Mapping[int, Place], locations: Mapping[int, Location], assign: Assign
    ) -> Self:
        """Let replicas that have their devices begin, as the first group. Raises what starting them raises."""
        groups = Groups(new_prefix())
        members = list(locations)
        meetings = groups.meet(members, list(locations.values()))
        fleet.start({m: assign(len(members), meeting) for m, meeting in zip(members, meetings, strict=True)})
        return cls(fleet=fleet, groups=groups, locations=locations, places=places)

    @property
    def is_whole(self) -> bool:
        """Whether everyone who was in the newest group is there and knows of it."""
        members = self.groups.members
        return len(self.standings) == len(members) == self.standings[members[0]].world_size

    @property
    def shares(self) -> Shares:
        """The newest that any member has been told."""
        known = [standing.shares for standing in self.standings.values() if standing.shares is not None]
        return max(known, key=lambda shares: shares.generation)

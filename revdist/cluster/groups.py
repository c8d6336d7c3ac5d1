"""Which members of a run form its process group, now and before, and the orders that change it.

A member is one replica's process; its number is never given to another. Its rank is its place in the
group, and changes when members are lost or join. Members that stay keep their order and newcomers
come last, so that rank 0 has always been there before.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Self, final

from revdist.cluster.actor import Location
from revdist.training.orders import Regroup, Rendezvous, Shares


def new_prefix() -> str:
    """A name for the groups of a run under one supervisor, among all that could meet at the same store."""
    return f"revdist-{uuid.uuid4().hex[:12]}"


Seats = tuple[int | None, ...]
"""The member at each rank; None: one that was lost before this supervisor could know it."""


@final
class Groups:
    """The groups of one run."""

    def __init__(self, prefix: str) -> None:
        """prefix: see `new_prefix`."""
        self._prefix = prefix
        self._formed: list[Seats] = []
        self._entered = 0

    @classmethod
    def taken_over(cls, prefix: str, number: int, seats: Seats) -> Self:
        """Groups of a run that another supervisor led to group `number`. prefix: another than the one it used."""
        groups = cls(prefix)
        groups._formed = [()] * number + [seats]
        groups._entered = number
        return groups

    @property
    def number(self) -> int:
        """Number of the newest group ordered."""
        return len(self._formed) - 1

    @property
    def number_at_work(self) -> int:
        """Number of the newest group that has taken a step, or of the first."""
        return self._entered

    @property
    def members(self) -> tuple[int, ...]:
        """Members of the newest group ordered, in rank order."""
        return _known(self._formed[-1])

    @property
    def working(self) -> tuple[int, ...]:
        """Members of the group at work: they hold the state of training."""
        return _known(self._formed[self._entered])

    @property
    def pending(self) -> bool:
        """Whether the newest group has not taken a step yet."""
        return self._entered < self.number

    def seats(self, number: int, world_size: int) -> Seats:
        """Who had which rank in a group of so many."""
        known = self._formed[number]
        return known + (None,) * (world_size - len(known))

    def rank_of(self, member: int) -> int:
        """Rank of a member in the newest group that it was in; -1 where it never was in one."""
        for members in reversed(self._formed):
            if member in members:
                return members.index(member)
        return -1

    def entered(self, number: int) -> bool:
        """Take note that a group has taken a step; whether that is news."""
        news = number > self._entered
        self._entered = max(self._entered, number)
        return news

    def meet(self, members: Sequence[int], locations: Sequence[Location]) -> list[Rendezvous]:
        """Make the members the newest group; returns where each one meets the others, in rank order."""
        self._formed.append(tuple(members))
        on_host: Counter[str] = Counter()
        meetings = []
        for rank, location in enumerate(locations):
            meetings.append(
                Rendezvous(
                    host=locations[0].address,
                    port=locations[0].store_port,
                    prefix=f"{self._prefix}/{self.number}",
                    rank=rank,
                    world_size=len(members),
                    local_rank=on_host[location.address],
                    address=location.address,
                )
            )
            on_host[location.address] += 1
        return meetings

    def order(
        self, members: Sequence[int], locations: Sequence[Location], shares: Shares, *, orderly: bool
    ) -> dict[int, Regroup]:
        """Make the members the newest group; returns each one's order. orderly: holds for members at work."""
        meetings, working = self.meet(members, locations), self.working
        return {
            member: Regroup(
                number=self.number, rendezvous=meeting, shares=shares, orderly=orderly and member in working
            )
            for member, meeting in zip(members, meetings, strict=True)
        }


def _known(seats: Seats) -> tuple[int, ...]:
    return tuple(member for member in seats if member is not None)

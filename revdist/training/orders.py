"""What a replica is told: its assignment, and orders kept until the step boundary at which they hold."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

from revdist.config import RunConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a group meet, and who this one is among them."""

    host: str
    """Address of the store."""
    port: int
    prefix: str
    """Name of this forming of the group."""
    rank: int
    world_size: int
    local_rank: int = 0
    """Number of this rank among those on its host."""
    address: str = "127.0.0.1"
    """This rank's own address, on the network that the ranks share."""
    timeout_s: float = 300.0
    """Longest wait for peers, in forming the group and in any collective."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a replica is to do, and as whom."""

    config: RunConfig
    rendezvous: Rendezvous | None
    """The group to start in; None: the run is under way, and the replica says when it is ready to join."""
    world_size: int
    """Replicas that the run is meant to have."""
    checkpoints: str | Path
    """Folder of the run's checkpoints, or its fsspec URL; written by rank 0."""
    resume: bool
    data: tuple[Any, Any] | None = None
    """The training and test data; None: what the configuration's factory gives."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """One generation of the cluster's plan: how every global batch is divided."""

    generation: int
    by_rank: tuple[int, ...]
    """Samples per rank; they sum to the global batch."""
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Regroup:
    """The order to leave the group and form another one with the ranks that there are now."""

    number: int
    """Counts the groups of a run; the first one is 0."""
    rendezvous: Rendezvous
    shares: Shares
    """Those that hold in the new group."""
    orderly: bool
    """All ranks of the present group are alive and change at an agreed step boundary, once they are connected to the
    newcomers; else it is left at once, and so is whatever a newcomer waits for in earlier ones."""


MayWrite = Callable[[], AbstractContextManager[bool]]
"""Whether nobody else writes the run, and nobody begins to before the context ends."""


@final
class Inbox:
    """Orders in, from any thread; the training thread looks at them between steps."""

    def __init__(self) -> None:
        self._shares: dict[int, Shares] = {}
        self._newest = -1
        self._regroup: Regroup | None = None
        self._ready_group = 0
        self._stop_reason: str | None = None
        self.may_write: MayWrite | None = None
        """Set where this rank is left alone: asked before it saves by itself."""
        self._changed = threading.Condition()
        self.interrupt: Callable[[int], None] | None = None
        """Called where a group must be left at once, with the number of the one to form."""
        self.prepare: Callable[[Regroup], None] | None = None
        """Called where a group can be prepared beside the one at work; returns at once, and `is_ready` follows."""

    def adopt(self, shares: Shares) -> None:
        """Keep shares until every rank has them."""
        with self._changed:
            self._shares[shares.generation] = shares
            while self._newest + 1 in self._shares:
                self._newest += 1
            self._changed.notify_all()

    def regroup(self, order: Regroup) -> None:
        """Keep the newest order to form another group."""
        with self._changed:
            if order.number <= self.newest_group:
                return
            self._regroup = order
            self._changed.notify_all()
        if order.orderly and self.prepare is not None:
            self.prepare(order)
            return
        self.is_ready(order.number)
        if not order.orderly and self.interrupt is not None:
            self.interrupt(order.number)

    def is_ready(self, number: int) -> None:
        """This rank can change to a group without waiting for anything but the others."""
        self._ready_group = max(self._ready_group, number)

    def stop(self, reason: str) -> None:
        """Save and leave at the next step boundary."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            self._changed.notify_all()

    def abandon(self, may_write: MayWrite) -> None:
        """Leave a group that comes to no step boundary, save alone and end: nobody is there to order another one."""
        with self._changed:
            self.may_write = may_write
            self._changed.notify_all()
        if self.interrupt is not None:
            self.interrupt(self.newest_group + 1)

    @property
    def newest_generation(self) -> int:
        """Newest generation received with none missing before it; -1: none."""
        return self._newest

    @property
    def newest_group(self) -> int:
        """Number of the newest group ordered; 0, the first, needs no order."""
        return 0 if self._regroup is None else self._regroup.number

    @property
    def ready_group(self) -> int:
        """Number of the newest group ordered that this rank is ready to change to."""
        return self._ready_group

    @property
    def newest_order(self) -> Regroup | None:
        """The newest order to form another group."""
        return self._regroup

    @property
    def newest_shares(self) -> Shares | None:
        """The newest shares known; those of a group that is yet to be formed count."""
        with self._changed:
            known = [*self._shares.values(), *([] if self._regroup is None else [self._regroup.shares])]
            return max(known, key=lambda shares: shares.generation, default=None)

    @property
    def stop_reason(self) -> str | None:
        return self._stop_reason

    def take(self, generation: int) -> Shares:
        """Shares of a generation that every rank has; older ones are forgotten."""
        with self._changed:
            shares = self._shares[generation]
            for old in [number for number in self._shares if number < generation]:
                del self._shares[old]
            return shares

    def wait_for_first(self) -> Shares | None:
        """The newest shares, once there are any; None when told to stop first."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest >= 0 or self._stop_reason is not None)
            return self._shares.get(self._newest) if self._stop_reason is None else None

    def wait_for_regroup(self, after: int, *, timeout_s: float | None = None) -> Regroup | None:
        """The newest order for a group later than number `after`; None where the time passes, or it is left alone."""
        with self._changed:
            self._changed.wait_for(lambda: self.newest_group > after or self.may_write is not None, timeout=timeout_s)
            return self._regroup if self.newest_group > after else None

    def enter(self, order: Regroup) -> None:
        """The group is formed: its shares hold, and what was published for the one before is forgotten."""
        with self._changed:
            first = order.shares.generation
            self._shares = {number: shares for number, shares in self._shares.items() if number > first}
            self._shares[first] = order.shares
            self._newest = first
            while self._newest + 1 in self._shares:
                self._newest += 1

"""What a replica is told: its assignment, and orders kept until the step boundary at which they hold."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import final

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
    rendezvous: Rendezvous
    checkpoints: Path
    """Folder of the run's checkpoints; written by rank 0."""
    resume: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """One generation of the cluster's plan: how every global batch is divided."""

    generation: int
    by_rank: tuple[int, ...]
    """Samples per rank; they sum to the global batch."""
    reason: str


@final
class Inbox:
    """Orders in, from any thread; the training thread looks at them between steps."""

    def __init__(self) -> None:
        self._shares: dict[int, Shares] = {}
        self._newest = -1
        self._stop_reason: str | None = None
        self._changed = threading.Condition()

    def adopt(self, shares: Shares) -> None:
        """Keep shares until every rank has them."""
        with self._changed:
            self._shares[shares.generation] = shares
            while self._newest + 1 in self._shares:
                self._newest += 1
            self._changed.notify_all()

    def stop(self, reason: str) -> None:
        """Save and leave at the next step boundary."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            self._changed.notify_all()

    @property
    def newest_generation(self) -> int:
        """Newest generation received with none missing before it; -1: none."""
        return self._newest

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

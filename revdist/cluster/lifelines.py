"""What of Ray a run hangs on: whether it still answers, and leaving in order where it does not come back.

Training needs the head of the cluster for nothing but starting and ending actors, so it goes on without. Ray,
though, ends the driver and every process on the other hosts once the head has been gone for a minute. By then the
run has saved. A head that comes back before, with its state kept, is no loss.

A host's own part of Ray, the raylet, does not come back. Its replicas train on without, until Ray ends them a
quarter of a minute later; where that is the end of all of them, the run saves at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import final

from revdist.cluster.address import parse_address, takes_connections
from revdist.cluster.companion import Companion
from revdist.errors import ConfigError

_LOOK_S = 0.5
_HELD_UP_S = 2.0
"""Pause between looks, beyond what they take, after which this process has been stopped meanwhile."""
_RAY_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAY_GIVES_UP_S = 60.0
"""Ray's own patience by default."""
_RAYLET_S = 3.0
"""Seconds after which a raylet that takes no connection is gone: much less than Ray leaves its processes."""


@final
class _Lifeline:
    """One end that must take connections, once it has been reached."""

    def __init__(self, what: str, address: str, patience_s: float, *, was_reached: bool) -> None:
        self.name = f"{what} at {address}"
        self.is_cut = False
        self._end = parse_address(address)
        self._patience_s = patience_s
        self._was_reached = was_reached
        self._missed_since_s: float | None = None

    def look(self, *, held_up: bool) -> None:
        """held_up: this process was, itself, since the last look: what went before does not count."""
        asked_s = time.monotonic()
        if takes_connections(*self._end, timeout_s=_LOOK_S):
            self._was_reached, self._missed_since_s = True, None
        elif self._was_reached and (self._missed_since_s is None or held_up):
            self._missed_since_s = asked_s
        missed_since_s = self._missed_since_s
        self.is_cut = missed_since_s is not None and time.monotonic() - missed_since_s > self._patience_s


@final
class Lifelines(Companion):
    """Looks after the head of a cluster, and this host's raylet where replicas end with it, while it is entered."""

    def __init__(self, head: str, *, head_s: float | None = None, raylet: str | None = None) -> None:
        """head: `HOST:PORT` of Ray's GCS. head_s: seconds for which it may be away; None: half of Ray's patience.
        raylet: `HOST:PORT` of this host's; None: replicas go on without.

        Raises ConfigError where Ray would be the first to give up.
        """
        ray_s = float(os.environ.get(_RAY_PATIENCE, _RAY_GIVES_UP_S))
        leave_s = ray_s / 2 if head_s is None else head_s
        if leave_s >= ray_s:
            raise ConfigError(
                f"faults.head_s is {leave_s:g}, and Ray ends all processes {ray_s:g} s after its head is gone: "
                f"set it lower, to leave time for saving, or {_RAY_PATIENCE} higher on every host of the cluster"
            )
        self._head = _Lifeline("the Ray head", head, leave_s, was_reached=True)
        self._all = [self._head]
        if raylet is not None:
            self._all.append(_Lifeline("this host's raylet", raylet, _RAYLET_S, was_reached=False))
        super().__init__("revdist-lifelines")

    @property
    def head_is_gone(self) -> bool:
        """Whether the head has been away for so long that the run should leave before Ray ends it."""
        return self._head.is_cut

    def or_cut(self, stop_reason: Callable[[], str | None]) -> Callable[[], str | None]:
        """Why the run shall save and end: what `stop_reason` says, or what is gone."""

        def reason() -> str | None:
            return stop_reason() or next((f"the loss of {one.name}" for one in self._all if one.is_cut), None)

        return reason

    def _run(self) -> None:
        looked_s = time.monotonic()
        while not self._ended.is_set():
            now_s = time.monotonic()
            held_up = now_s - looked_s > _HELD_UP_S + len(self._all) * _LOOK_S
            looked_s = now_s
            for one in self._all:
                one.look(held_up=held_up)
            self._ended.wait(_LOOK_S)

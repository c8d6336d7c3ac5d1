"""The head of the Ray cluster: whether it still answers, and leaving in order where it does not come back.

Training needs the head for nothing but starting and ending actors, so it goes on without. Ray, though, ends
the driver and every process on the other hosts once the head has been gone for a minute. By then the run
has saved. A head that comes back before, with its state kept, is no loss.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, final

from revdist.cluster.address import parse_address, takes_connections
from revdist.errors import ConfigError

_LOOK_S = 1.0
_RAY_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAY_GIVES_UP_S = 60.0
"""Ray's own patience by default."""


@final
class HeadWatch:
    """Looks after the head at an address, while it is entered."""

    def __init__(self, address: str, *, patience_s: float | None = None) -> None:
        """address: `HOST:PORT` of Ray's GCS. patience_s: seconds for which it may be away; None: half of Ray's.

        Raises ConfigError where Ray would be the first to give up.
        """
        self._end = parse_address(address)
        self.address = address
        ray_s = float(os.environ.get(_RAY_PATIENCE, _RAY_GIVES_UP_S))
        self._leave_s = ray_s / 2 if patience_s is None else patience_s
        if self._leave_s >= ray_s:
            raise ConfigError(
                f"faults.head_s is {self._leave_s:g}, and Ray ends all processes {ray_s:g} s after its head is gone: "
                f"set it lower, to leave time for saving, or {_RAY_PATIENCE} higher on every host of the cluster"
            )
        self._seen_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="revdist-head", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    @property
    def is_gone(self) -> bool:
        """Whether the head has been away for so long that the run should leave before Ray ends it."""
        return time.monotonic() - self._seen_s > self._leave_s

    def or_gone(self, stop_reason: Callable[[], str | None]) -> Callable[[], str | None]:
        """Why the run shall save and end: what `stop_reason` says, or that the head is gone."""
        return lambda: stop_reason() or (f"the loss of the Ray head at {self.address}" if self.is_gone else None)

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_S):
            if takes_connections(*self._end, timeout_s=_LOOK_S):
                self._seen_s = time.monotonic()

"""What is done to a training that runs."""

from __future__ import annotations

import dataclasses
import signal


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that happens to some ranks of a job."""

    key: str
    name: str
    ranks: tuple[int, ...]
    signal: signal.Signals | None
    """What their processes are sent; None: memory of their devices is taken away."""
    num_workers: int = 2


FAULTS = (
    Fault(key="kill-worker", name="worker kill -9", ranks=(1,), signal=signal.SIGKILL),
    Fault(key="kill-first", name="rank 0 kill -9", ranks=(0,), signal=signal.SIGKILL),
    Fault(key="kill-two", name="two of three kill -9", ranks=(0, 1), signal=signal.SIGKILL, num_workers=3),
    Fault(key="freeze", name="worker frozen", ranks=(1,), signal=signal.SIGSTOP),
    Fault(key="replan", name="live replan of one rank", ranks=(1,), signal=None),
)

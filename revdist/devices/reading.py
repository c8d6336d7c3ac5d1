"""One sample of a device's memory."""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal["cpu", "cuda"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds memory of a device."""

    pid: int
    """In the pid namespace of the machine, which inside a container may not be ours."""
    name: str
    used_bytes: int | None
    """None where the driver does not say, as in most containers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One sample of a device's memory, taken at `time_s`."""

    uuid: str
    """Names the device wherever it is seen: `GPU-...`, `MIG-...` or `CPU-...`."""
    name: str
    """CPU: the name it is opened by, `cpu-0`. CUDA: the product name."""
    kind: Kind
    index: int
    """CUDA: NVML's number, which is not torch's; a MIG instance has its GPU's. CPU: the number in its name."""
    host: str
    total_bytes: int
    """0: the device cannot be used; `note` says why."""
    free_bytes: int
    """What the device may still hand out, as it says itself: not `total_bytes` less what holders have."""
    used_bytes: int
    time_s: float
    """Seconds since the epoch."""
    holders: tuple[Holder, ...] = ()
    """Largest first."""
    note: str = ""
    """What is unusual about the device, in one line; empty: nothing."""

    @property
    def usable(self) -> bool:
        """Whether something can run on it."""
        return self.total_bytes > 0

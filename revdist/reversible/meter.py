"""How the profiler reads a device's memory; `revdist.devices` has meters for every device."""

from __future__ import annotations

from typing import Protocol


class MemoryMeter(Protocol):
    """Memory that this process's tensors take on one device, from the device's own allocator."""

    @property
    def exact(self) -> bool:
        """Whether every byte is counted when it is allocated; else the numbers are estimates."""

    def allocated_bytes(self) -> int:
        """Bytes of the tensors that live now."""

    def peak_bytes(self) -> int:
        """Most bytes that lived at once since the last `reset_peak`."""

    def reset_peak(self) -> None:
        """Start a new peak at what lives now."""

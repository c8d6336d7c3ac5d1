"""An estimate of what tensors take, from the kernel's view of the process: for where nothing can be compiled."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

_M_MMAP_THRESHOLD = -3


class ResidentMeter:
    """Resident memory of this process above what it was at the start.

    It sees Python's own objects and oneDNN's scratch too, and memory only once it is touched.
    """

    exact: bool = False

    def __init__(self, publish: Callable[[int], None] = lambda num_bytes: None) -> None:
        """`publish` is told the allocated bytes each time they are read."""
        self.publish = publish
        # Without this, glibc keeps what is freed, and the process seems to hold it still.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536)
        self._start_bytes = _status("VmRSS")

    def allocated_bytes(self) -> int:
        num_bytes = max(0, _status("VmRSS") - self._start_bytes)
        self.publish(num_bytes)
        return num_bytes

    def peak_bytes(self) -> int:
        return max(0, _status("VmHWM") - self._start_bytes)

    def reset_peak(self) -> None:
        with contextlib.suppress(OSError):  # a kernel without it: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0

"""Memory that is freed stays with the process, so that steps do not differ by who gave it back.

glibc returns what is freed at the top of its heap to the kernel, and the next step faults it in again
page by page: up to a twentieth of a step. Whether that happens hangs on what lies at the top, so one way
of running a network pays and the other does not, and both pay after one that needs less memory.
"""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_BYTES = 2**31 - 1
_LARGEST_BYTES = 2**30


def keep_freed_memory() -> None:
    """For this process, from now on; nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)

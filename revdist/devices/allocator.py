"""The native allocator of this process, reached through ctypes.

A process computes on one CPU device at a time, so this is module state: the allocator is torch's,
and torch has one. See native/allocator.cpp.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from revdist.devices import build
from revdist.errors import DeviceError

_log = logging.getLogger(__name__)
Callback = Callable[[int], int]
_NativeCallback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_INTERRUPT_AGAIN_S = 0.01
_NO_CALLBACK = _NativeCallback()


class NativeAllocator:
    """The functions of native/allocator.cpp, without their prefix."""

    is_active: Callable[[], int]
    """Whether CPU storages are charged; not in a forked child."""
    allocated_bytes: Callable[[], int]
    peak_bytes: Callable[[], int]
    reset_peak: Callable[[], None]
    kept_bytes: Callable[[], int]
    """Freed blocks that this process keeps to use them again."""
    deactivate: Callable[[], None]
    take: Callable[[int], int | None]
    """Takes and touches bytes as a tensor storage would; its address, or None where there are too few."""
    give_back: Callable[[int], None]

    def __init__(self, library: Path) -> None:
        # libc10 stands alone: it loads in milliseconds, all of torch in seconds.
        ctypes.CDLL(str(build.torch_folder() / "lib" / "libc10.so"))
        self._library = ctypes.CDLL(str(library))
        self._bind("is_active", ctypes.c_int)
        self._bind("allocated_bytes", ctypes.c_int64)
        self._bind("peak_bytes", ctypes.c_int64)
        self._bind("reset_peak", None)
        self._bind("kept_bytes", ctypes.c_int64)
        self._bind("deactivate", None)
        self._bind("take", ctypes.c_void_p, ctypes.c_uint64)
        self._bind("give_back", None, ctypes.c_void_p)
        self._bind("_activate", ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
        self._bind("_on_shortage", None, _NativeCallback)
        self._registered: Any = None
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)
        atexit.register(self.on_shortage, None)

    def activate(self, ledger: Path, slot_index: int) -> None:
        """Charges this process's CPU storages to its slot of the ledger from now on.

        Raises DeviceError where torch's allocator cannot be wrapped or the ledger not be mapped.
        """
        error: int = self._activate(os.fsencode(ledger), slot_index)  # type: ignore[attr-defined]
        if error:
            raise DeviceError(f"cannot charge to {ledger}: {os.strerror(error)}")
        self.reset_peak()

    def on_shortage(self, callback: Callback | None) -> None:
        """Calls `callback(missing_bytes)` inside an allocation that fails; it returns the bytes it released.

        The allocation is retried while something is released. It runs in whichever thread allocates,
        one at a time; an allocation that fails inside it fails at once.
        """
        native = _NO_CALLBACK if callback is None else _NativeCallback(functools.partial(self._call, callback))
        self._on_shortage(native)  # type: ignore[attr-defined]
        self._registered = native  # ctypes does not keep what C calls

    def _call(self, callback: Callback, missing_bytes: int) -> int:
        # Nothing may be raised into the allocator: what fails here has released nothing, and the
        # allocation then raises torch.OutOfMemoryError by itself.
        try:
            with self._lock:
                return int(callback(missing_bytes))
        except Exception:
            _log.exception("the callback on a memory shortage failed")
            return 0
        except KeyboardInterrupt:  # C cannot pass it on: it comes again once C has returned
            threading.Timer(_INTERRUPT_AGAIN_S, _thread.interrupt_main).start()
            return 0

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def _bind(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self._library, f"revdist_{name.lstrip('_')}")
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)


@functools.lru_cache(maxsize=1)
def load_allocator() -> NativeAllocator:
    """The allocator of this process, compiled on this machine's first use.

    Raises CompilerMissing where it cannot be compiled.
    """
    return NativeAllocator(build.build("allocator.cpp"))

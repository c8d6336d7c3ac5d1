"""Asking a process for memory inside a failing CUDA allocation. Off by default; not measured on a GPU yet.

torch's caching allocator runs registered callbacks where its cache has no block, before it asks the driver, so the
native part looks at the driver's free memory first. It also holds the allocator's lock meanwhile: were another
Python thread to free a CUDA tensor at that moment, it would hold the interpreter and wait for the lock, while the
callback holds the lock and waits for the interpreter. A process in which only the training thread touches CUDA
tensors, and the garbage collector runs there alone, may set REVDIST_CUDA_SHORTAGE=1. All others
meet a shortage by redoing the micro-batch.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from revdist.devices.build import build
from revdist.errors import DeviceError

_log = logging.getLogger(__name__)
_NativeCallback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_registered: Any = None  # ctypes does not keep what C calls


def register(callback: Callable[[int], int] | None) -> bool:
    """Registers the callback if the process allows it and it can be compiled. False: redo the micro-batch instead."""
    global _registered
    if os.environ.get("REVDIST_CUDA_SHORTAGE") != "1":
        return False
    try:
        library = _load()
    except (DeviceError, OSError) as error:
        _log.warning("memory shortages on CUDA are met by redoing the micro-batch: %s", error)
        return False
    native = _NativeCallback() if callback is None else _NativeCallback(functools.partial(_call, callback))
    library.revdist_cuda_on_shortage(native)
    _registered = native
    return True


def _call(callback: Callable[[int], int], missing_bytes: int) -> int:
    try:
        return int(callback(missing_bytes))
    except Exception:
        _log.exception("the callback on a memory shortage failed")
        return 0


@functools.lru_cache(maxsize=1)
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("cuda_shortage.cpp", libraries=("c10", "c10_cuda"))))
    library.revdist_cuda_on_shortage.argtypes = [_NativeCallback]
    library.revdist_cuda_on_shortage.restype = None
    atexit.register(library.revdist_cuda_on_shortage, _NativeCallback())
    return library

"""One door to device memory: NVML, and the CPU device.

    list_devices()  -> readings of everything on this machine
    open_device()   -> a Device: read(), meter(), activate(), on_shortage()

Importing it loads neither torch nor NVML.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from revdist.devices.device import Device, MemoryMeter
from revdist.devices.discovery import list_devices, open_device
from revdist.devices.reading import Holder, Reading

__all__ = ["Device", "Holder", "MemoryMeter", "Reading", "list_devices", "open_device"]


class _CallableModule(types.ModuleType):
    """`revdist.devices()` is public, and so is this package: the name has to serve as both."""

    def __call__(self, **arguments: Any) -> list[Reading]:
        return list_devices(**arguments)


sys.modules[__name__].__class__ = _CallableModule

"""What every device offers, whatever it is."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from revdist.devices.reading import Kind, Reading

if TYPE_CHECKING:
    import torch


class MemoryMeter(Protocol):
    """Memory of a device that this process's tensors take, from the device's own allocator."""

    exact: bool
    """Whether every byte is counted when it is allocated; else the numbers are estimates."""

    def allocated_bytes(self) -> int: ...

    def peak_bytes(self) -> int:
        """Most bytes allocated at once since the last `reset_peak`."""

    def reset_peak(self) -> None: ...


class Device(abc.ABC):
    """A device that a replica can run on. Making one touches nothing; `activate` does."""

    kind: Kind
    uuid: str
    name: str

    @property
    @abc.abstractmethod
    def torch_device(self) -> torch.device:
        """Where tensors go: valid in the process that called `activate`."""

    @abc.abstractmethod
    def read(self) -> Reading:
        """Its memory now.

        Raises DeviceLost, or another DeviceError, if the device does not answer.
        """

    @abc.abstractmethod
    def meter(self) -> MemoryMeter:
        """Counters of this process: valid after `activate`."""

    @abc.abstractmethod
    def activate(self, process_name: str = "") -> None:
        """Makes this process compute on the device. Call it first, before the process allocates tensors.

        `process_name` is what others read as the holder's name; empty: the program's name.
        """

    @abc.abstractmethod
    def on_shortage(self, callback: Callable[[int], int] | None) -> bool:
        """Calls `callback(missing_bytes) -> released_bytes` inside an allocation that fails, then retries it.

        False: this device cannot, and a failing allocation raises torch.OutOfMemoryError at once. None: no callback.
        """

"""The CPU device: part of the host's memory, with a capacity that is enforced and shared between processes."""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from revdist.devices import host
from revdist.devices.allocator import NativeAllocator, load_allocator
from revdist.devices.device import Device, MemoryMeter
from revdist.devices.ledger import Balance, Ledger, device_number, ledger_path, ledger_uuid
from revdist.devices.reading import Reading
from revdist.devices.resident import ResidentMeter
from revdist.errors import DeviceError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
DEFAULT_NAME = "cpu-0"


class CpuDevice(Device):
    """A share of the host's memory, counted in a ledger that all processes of this user can open.

    After `activate`, every CPU tensor storage of the process is charged to it and an allocation past
    the capacity raises torch.OutOfMemoryError, as on a GPU. Not charged: storages made before, memory
    that is not torch's, and anything a forked child allocates before it activates the device itself.
    """

    kind: Literal["cpu"] = "cpu"

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._allocator: NativeAllocator | None = None
        self._resident: ResidentMeter | None = None
        self._reserved: int | None = None
        self.name = ledger.name
        self.uuid = ledger.uuid

    @classmethod
    def open(
        cls, name: str = "", *, capacity_bytes: int | None = None, directory: str | Path | None = None
    ) -> CpuDevice:
        """The device of that name, created if a capacity is given.

        `cpu-0`, which no name means too, needs no capacity: it is created with what the host has free. One that
        exists is taken as it is.
        Raises DeviceNotFound for another name that does not exist without a capacity, UsageError if it is in use with
        another capacity.
        """
        name = name or DEFAULT_NAME
        path = ledger_path(name, directory)
        if capacity_bytes is None and name == DEFAULT_NAME and not path.exists():
            capacity_bytes = host.host_memory()[1]
        return cls(Ledger(path) if capacity_bytes is None else Ledger.create(path, capacity_bytes))

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    @property
    def capacity_bytes(self) -> int:
        return self._ledger.capacity_bytes

    @property
    def ledger_path(self) -> Path:
        return self._ledger.path

    @property
    def enforced(self) -> bool:
        """Whether this process's storages are charged as they are allocated."""
        return self._allocator is not None and bool(self._allocator.is_active())

    def read(self) -> Reading:
        if self._resident is not None:
            self._resident.allocated_bytes()  # publishes what this process holds
        # To the host freed blocks that are kept are taken; to this process they are free.
        kept_bytes = 0 if self._allocator is None else self._allocator.kept_bytes()
        return _reading(self.name, self.uuid, self._ledger.balance(), kept_bytes=kept_bytes)

    def reserve(self) -> bool:
        """Keep the device for this process until it ends; False where another process keeps it.

        Binds only those who ask: co-tenants do not.
        """
        if self._reserved is None:
            file = os.open(self._ledger.path, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                return False
            self._reserved = file
        return True

    def resize(self, capacity_bytes: int) -> None:
        """Give the device another capacity. Raises UsageError while another process uses it."""
        self._ledger.resize(capacity_bytes)

    def meter(self) -> MemoryMeter:
        """Exact where the native allocator works, else the process's resident memory.

        Raises DeviceError before `activate`.
        """
        if self._allocator is not None:
            return LedgerMeter(self._allocator)
        if self._resident is not None:
            return self._resident
        raise DeviceError(f"device {self.name} is not active in this process: call activate() first")

    def activate(self, process_name: str = "") -> None:
        slot_index = self._ledger.claim_slot(process_name or host.process_name(os.getpid()))
        try:
            allocator = load_allocator()
            allocator.activate(self._ledger.path, slot_index)
            self._allocator = allocator
        except DeviceError as error:
            _log.warning("device %s works, but its capacity is not enforced: %s", self.name, error)
            self._resident = ResidentMeter(functools.partial(self._ledger.charge_by_hand, slot_index))
            self._resident.allocated_bytes()

    def deactivate(self) -> None:
        """Charges nothing more. What was charged is given back as it is freed."""
        if self._allocator is not None:
            self._allocator.deactivate()
        if self._resident is not None:
            self._resident.publish(0)
        self._allocator = self._resident = None

    def on_shortage(self, callback: Callable[[int], int] | None) -> bool:
        if self._allocator is None:
            return False
        self._allocator.on_shortage(callback)
        return True

    def remove(self) -> None:
        """Deletes the device. Raises DeviceError while another process uses it."""
        self._ledger.remove()


class LedgerMeter:
    """What the ledger says of this process: exact, at some 0.2 us a call."""

    exact: bool = True

    def __init__(self, allocator: NativeAllocator) -> None:
        self.allocated_bytes = allocator.allocated_bytes
        self.peak_bytes = allocator.peak_bytes
        self.reset_peak = allocator.reset_peak


def plain_reading(directory: str | Path | None = None) -> Reading:
    """The host's memory as the device that `CpuDevice.open()` would create."""
    total, free = host.host_memory()
    balance = Balance(capacity_bytes=total, used_bytes=total - free, holders=(), num_unenforced=0)
    return _reading(DEFAULT_NAME, ledger_uuid(ledger_path(DEFAULT_NAME, directory)), balance)


def _reading(name: str, uuid: str, balance: Balance, *, kept_bytes: int = 0) -> Reading:
    host_free_bytes = host.host_memory()[1] + kept_bytes
    free_bytes = max(0, balance.capacity_bytes - balance.used_bytes)
    notes = []
    if balance.num_unenforced:
        notes.append(f"capacity not enforced on {balance.num_unenforced} process(es): no C++ compiler")
    if host_free_bytes < free_bytes:
        notes.append("the host has less memory free than the device")
    return Reading(
        uuid=uuid,
        name=name,
        kind="cpu",
        index=device_number(name),
        host=host.host_name(),
        total_bytes=balance.capacity_bytes,
        free_bytes=min(free_bytes, host_free_bytes),
        used_bytes=balance.used_bytes,
        time_s=time.time(),
        holders=balance.holders,
        note="; ".join(notes),
    )

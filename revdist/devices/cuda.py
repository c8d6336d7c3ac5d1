"""The CUDA device: a GPU or MIG instance, read through NVML and computed on through torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from revdist.devices import host, nvml
from revdist.devices.device import Device, MemoryMeter
from revdist.devices.reading import Reading
from revdist.devices.xid import Xid
from revdist.errors import DeviceError, DeviceLost, DeviceNotFound, NotSupportedByDevice

if TYPE_CHECKING:
    import torch


class CudaDevice(Device):
    """A GPU or MIG instance, known by its UUID: NVML's and torch's numbers differ."""

    kind: Literal["cuda"] = "cuda"

    def __init__(self, uuid: str) -> None:
        """Raises DeviceNotFound, or another DeviceError of the driver."""
        reading = nvml.read_device(uuid)
        self.uuid = reading.uuid
        self.name = reading.name
        self._torch_index: int | None = None
        self._watch: nvml.XidWatch | None = None
        self._xids: list[Xid] = []
        with contextlib.suppress(NotSupportedByDevice):
            self._watch = nvml.XidWatch(uuid)

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", self._active_index())

    def read(self) -> Reading:
        if self._watch is not None:
            self._xids += self._watch.poll()
        for xid in self._xids:
            if xid.loses_device:
                raise DeviceLost(f"{self.uuid}: {xid}", uuid=self.uuid, xid=xid.number)
        try:
            reading = nvml.read_device(self.uuid)
        except NotSupportedByDevice:
            if self._torch_index is None:
                raise
            reading = self._read_through_torch()
        if not self._xids:
            return reading
        return dataclasses.replace(reading, note="; ".join(filter(None, (reading.note, str(self._xids[-1])))))

    def meter(self) -> MemoryMeter:
        return CudaMeter(self._active_index())

    def activate(self, process_name: str = "") -> None:
        """Makes torch compute on this device. The driver names processes itself: `process_name` is not used.

        Where CUDA is not yet initialised, CUDA_VISIBLE_DEVICES is set to this device alone: the list that was
        inherited may leave it out, and a MIG instance cannot be reached in any other way.
        Raises DeviceNotFound where torch sees no such device.
        """
        import torch

        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            os.environ["CUDA_VISIBLE_DEVICES"] = self.uuid
        index = torch_index(self.uuid)
        torch.cuda.set_device(index)
        self._torch_index = index

    def on_shortage(self, callback: Callable[[int], int] | None) -> bool:
        from revdist.devices import cuda_shortage

        return cuda_shortage.register(callback)

    def _active_index(self) -> int:
        if self._torch_index is None:
            raise DeviceError(f"device {self.uuid} is not active in this process: call activate() first")
        return self._torch_index

    def _read_through_torch(self) -> Reading:
        """For devices that share the host's memory, whose memory NVML does not report."""
        import torch

        free_bytes, total_bytes = torch.cuda.mem_get_info(self._torch_index)
        return Reading(
            uuid=self.uuid,
            name=self.name,
            kind="cuda",
            index=0,
            host=host.host_name(),
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            used_bytes=total_bytes - free_bytes,
            time_s=time.time(),
            note="read through torch: NVML does not report its memory",
        )


class CudaMeter:
    """What torch's caching allocator says of this process."""

    exact: bool = True

    def __init__(self, index: int) -> None:
        self.index = index

    def allocated_bytes(self) -> int:
        import torch

        return torch.cuda.memory_allocated(self.index)

    def peak_bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self.index)

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.index)


def torch_index(uuid: str) -> int:
    """torch's number of the device in this process.

    Raises DeviceNotFound where torch does not see it.
    """
    import torch

    wanted = uuid.removeprefix("GPU-").removeprefix("MIG-")
    seen = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if wanted in seen:
        return seen.index(wanted)
    if uuid.startswith("MIG-") and len(seen) == 1 and os.environ.get("CUDA_VISIBLE_DEVICES") == uuid:
        return 0  # some drivers give a MIG instance its GPU's UUID; CUDA shows one instance a process
    raise DeviceNotFound(
        f"torch sees {len(seen)} CUDA devices, {uuid} is not among them: activate it before anything else "
        f"uses CUDA in this process (CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
    )

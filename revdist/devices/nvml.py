"""The one door to NVML: devices by UUID, MIG instances included, and every error as one of ours.

The library is loaded on first use. NVML numbers devices by PCI bus and ignores CUDA_VISIBLE_DEVICES, so
nothing here takes an index. A GPU that is split by MIG is never read itself, only its instances.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from revdist.devices import host
from revdist.devices.reading import Holder, Reading
from revdist.devices.xid import Xid
from revdist.errors import (
    DeviceError,
    DeviceLost,
    DeviceNotFound,
    DriverMismatch,
    DriverMissing,
    NotSupportedByDevice,
)

# By the name of NVML's code: ours, and what to do about it.
_ERRORS: dict[str, tuple[type[DeviceError], str]] = {
    "LIBRARY_NOT_FOUND": (DriverMissing, "install the NVIDIA driver, or train on devices of kind cpu"),
    "DRIVER_NOT_LOADED": (DriverMissing, "load the NVIDIA kernel module, or train on devices of kind cpu"),
    "LIB_RM_VERSION_MISMATCH": (DriverMismatch, "reboot, or reload the NVIDIA kernel module"),
    "NOT_FOUND": (DeviceNotFound, "`revdist devices` lists what there is"),
    "INVALID_ARGUMENT": (DeviceNotFound, "`revdist devices` lists what there is"),
    "GPU_NOT_FOUND": (DeviceNotFound, "`revdist devices` lists what there is"),
    "GPU_IS_LOST": (DeviceLost, "check its power and slot, then reboot"),
    "RESET_REQUIRED": (DeviceLost, "reset it with nvidia-smi --gpu-reset"),
    "NOT_SUPPORTED": (NotSupportedByDevice, "choose another device, or read it through torch.cuda"),
    "FUNCTION_NOT_FOUND": (NotSupportedByDevice, "update the NVIDIA driver"),
    "NO_PERMISSION": (DeviceError, "run as a user, or in a container, that may open /dev/nvidia*"),
    "INSUFFICIENT_POWER": (DeviceError, "check the device's power cables"),
    "IRQ_ISSUE": (DeviceError, "check the kernel's log for interrupt errors"),
    "IN_USE": (DeviceError, "end what else uses the device"),
}
_UNKNOWN = (DeviceError, "see `nvidia-smi` and the kernel's log")

_lock = threading.Lock()
_initialized_by = 0  # pid: a forked child has to initialise NVML itself


def read_devices() -> list[Reading]:
    """A reading of every GPU and MIG instance, in NVML's order.

    A device that fails is listed with `total_bytes` 0 and the trouble in `note`.
    Raises DriverMissing, DriverMismatch or another DeviceError where NVML itself does not answer.
    """
    readings: list[Reading] = []
    for index in range(_call("nvmlDeviceGetCount")):
        try:
            readings.extend(_read(handle, index) for handle in _usable_handles(index))
        except DeviceError as error:
            readings.append(_unreadable(index, error))
    return readings


def read_device(uuid: str) -> Reading:
    """A reading of the GPU or MIG instance.

    Raises DeviceNotFound, DeviceLost, NotSupportedByDevice or another DeviceError.
    """
    handle = _handle(uuid)
    gpu = _gpu_of(handle, uuid)
    if gpu is handle and _is_split(handle):
        raise DeviceError(f"{uuid} is split by MIG: choose one of its instances, which `revdist devices` lists")
    return _read(handle, _call("nvmlDeviceGetIndex", gpu, about=uuid))


def driver_version() -> str:
    """Version of the NVIDIA driver. Raises DriverMissing or DriverMismatch."""
    return str(_call("nvmlSystemGetDriverVersion"))


def cuda_version() -> tuple[int, int]:
    """Newest CUDA that the driver serves, `(12, 4)`. Raises DriverMissing or DriverMismatch."""
    number = int(_call("nvmlSystemGetCudaDriverVersion_v2"))
    return number // 1000, number % 1000 // 10


class XidWatch:
    """Errors that the driver reports for a device, from the moment this is made."""

    def __init__(self, uuid: str) -> None:
        """Raises NotSupportedByDevice where the device reports no errors, DeviceNotFound for an unknown one."""
        import pynvml

        self._uuid = uuid
        self._events = _call("nvmlEventSetCreate")
        # An error of a GPU that is split is an error of each instance: only the whole has events.
        gpu = _gpu_of(_handle(uuid), uuid)
        _call("nvmlDeviceRegisterEvents", gpu, pynvml.nvmlEventTypeXidCriticalError, self._events, about=uuid)

    def poll(self, timeout_s: float = 0.0) -> list[Xid]:
        """The errors since the last poll, waiting up to `timeout_s` for the first."""
        import pynvml

        found: list[Xid] = []
        while True:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0 if found else round(timeout_s * 1000))
            except pynvml.NVMLError_Timeout:
                return found
            except pynvml.NVMLError as error:
                raise _translate(error, self._uuid) from None
            found.append(Xid(uuid=self._uuid, number=int(event.eventData)))

    def close(self) -> None:
        _call("nvmlEventSetFree", self._events)


def _usable_handles(index: int) -> Iterator[Any]:
    """The GPU, or its MIG instances where it is split."""
    import pynvml

    gpu = _call("nvmlDeviceGetHandleByIndex", index, about=f"GPU {index}")
    if not _is_split(gpu):
        yield gpu
        return
    for instance in range(_call("nvmlDeviceGetMaxMigDeviceCount", gpu, about=f"GPU {index}")):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, instance)
        except pynvml.NVMLError_NotFound:
            continue  # a place where no instance was created


def _is_split(gpu: Any) -> bool:
    try:
        current, _pending = _call("nvmlDeviceGetMigMode", gpu)
    except NotSupportedByDevice:
        return False
    return bool(current)


def _handle(uuid: str) -> Any:
    return _call("nvmlDeviceGetHandleByUUID", uuid, about=uuid)


def _uuid(handle: Any) -> str:
    return str(_call("nvmlDeviceGetUUID", handle))


def _gpu_of(handle: Any, uuid: str) -> Any:
    """The GPU that the handle stands for or, for a MIG instance, lies on."""
    return _call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) if uuid.startswith("MIG-") else handle


def _read(handle: Any, index: int) -> Reading:
    uuid = _uuid(handle)
    memory = _call("nvmlDeviceGetMemoryInfo", handle, about=uuid)
    holders, note = _holders(handle)
    return Reading(
        uuid=uuid,
        name=str(_call("nvmlDeviceGetName", handle, about=uuid)),
        kind="cuda",
        index=index,
        host=host.host_name(),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        used_bytes=int(memory.total - memory.free),  # `used` leaves out what the driver reserves
        time_s=time.time(),
        holders=holders,
        note=note,
    )


def _holders(handle: Any) -> tuple[tuple[Holder, ...], str]:
    used: dict[int, int | None] = {}
    try:
        for kind in ("Compute", "Graphics"):
            for process in _call(f"nvmlDeviceGet{kind}RunningProcesses", handle):
                used[process.pid] = process.usedGpuMemory
    except DeviceLost:
        raise
    except DeviceError as error:
        return (), f"who holds its memory is unknown: {error}"
    ordered = sorted(used.items(), key=lambda item: -(item[1] or 0))
    return tuple(Holder(pid=pid, name=_process_name(pid), used_bytes=num_bytes) for pid, num_bytes in ordered), ""


def _process_name(pid: int) -> str:
    """Ours if we can see the process, else what the driver calls it: in a container its pid is another machine's."""
    if name := host.process_name(pid):
        return name
    try:
        return str(_call("nvmlSystemGetProcessName", pid))
    except DeviceError:
        return "?"


def _unreadable(index: int, error: DeviceError) -> Reading:
    uuid, name = "", f"GPU {index}"
    with contextlib.suppress(DeviceError):
        handle = _call("nvmlDeviceGetHandleByIndex", index)
        uuid = _uuid(handle)
        name = str(_call("nvmlDeviceGetName", handle))
    return Reading(
        uuid=uuid,
        name=name,
        kind="cuda",
        index=index,
        host=host.host_name(),
        total_bytes=0,
        free_bytes=0,
        used_bytes=0,
        time_s=time.time(),
        note=str(error),
    )


def _call(function: str, *arguments: Any, about: str = "NVML") -> Any:
    """Calls NVML, initialising it first and again if another library in this process has shut it down."""
    import pynvml

    try:
        _initialize()
        try:
            return getattr(pynvml, function)(*arguments)
        except pynvml.NVMLError_Uninitialized:
            _initialize(again=True)
            return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError as error:
        raise _translate(error, about) from None


def _initialize(*, again: bool = False) -> None:
    import pynvml

    global _initialized_by
    with _lock:
        if again or _initialized_by != os.getpid():
            pynvml.nvmlInit()
            _initialized_by = os.getpid()


def _translate(error: Any, about: str) -> DeviceError:
    import pynvml

    names = {
        value: name.removeprefix("NVML_ERROR_")
        for name, value in vars(pynvml).items()
        if name.startswith("NVML_ERROR_")
    }
    code = names.get(error.value, str(error.value))
    ours, remedy = _ERRORS.get(code, _UNKNOWN)
    return ours(f"{about}: {error} (NVML_ERROR_{code}): {remedy}", code=code)

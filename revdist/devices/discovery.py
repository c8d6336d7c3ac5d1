"""Finding devices: what there is on this machine, and opening one of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from revdist.devices import nvml
from revdist.devices.cpu import CpuDevice, plain_reading
from revdist.devices.cuda import CudaDevice
from revdist.devices.device import Device
from revdist.devices.ledger import ledger_paths
from revdist.devices.reading import Kind, Reading
from revdist.errors import DeviceError, DeviceNotFound, DriverMissing, UsageError

_log = logging.getLogger(__name__)


def list_devices(*, directory: str | Path | None = None) -> list[Reading]:
    """A reading of every device of this machine: GPUs first, then CPU devices.

    A device that does not answer is listed with `total_bytes` 0 and its trouble in `note`. Where there is
    neither a GPU nor a CPU device the host's memory is listed as the one CPU device that could be opened.
    """
    readings = [*_read_gpus(), *_read_cpu_devices(directory)]
    return readings or [plain_reading(directory)]


def open_device(
    *,
    kind: Kind | None = None,
    name: str = "",
    uuid: str = "",
    capacity_bytes: int | None = None,
    directory: str | Path | None = None,
) -> Device:
    """The device with that UUID or name; a CPU device is created if it has a capacity.

    With neither: the first GPU (`cuda`), or `cpu-0` over all the host's free memory (`cpu`, the default).
    Raises DeviceNotFound, UsageError for a choice that contradicts itself, or the driver's DeviceError.
    """
    kind = kind or ("cuda" if uuid.startswith(("GPU-", "MIG-")) else "cpu")
    if kind == "cuda":
        if name or capacity_bytes is not None:
            raise UsageError("a CUDA device is chosen by its uuid, and has the capacity that it has")
        return CudaDevice(uuid or _first_usable(nvml.read_devices()).uuid)
    if uuid and not name:
        name = _first_usable(r for r in _read_cpu_devices(directory) if r.uuid == uuid).name
    return CpuDevice.open(name, capacity_bytes=capacity_bytes, directory=directory)


def _read_gpus() -> list[Reading]:
    try:
        return nvml.read_devices()
    except DriverMissing:
        return []  # a machine without GPUs
    except DeviceError as error:
        _log.warning("the GPUs of this machine cannot be listed: %s", error)
        return []


def _read_cpu_devices(directory: str | Path | None) -> list[Reading]:
    readings = []
    for path in ledger_paths(directory):
        try:
            readings.append(CpuDevice.open(path.stem, directory=path.parent).read())
        except DeviceError as error:  # removed meanwhile, or not a ledger
            _log.warning("%s", error)
    return readings


def _first_usable(readings: Iterable[Reading]) -> Reading:
    for reading in readings:
        if reading.usable:
            return reading
    raise DeviceNotFound("no such device here: `revdist devices` lists what there is")

"""What this machine lacks for training on it, each with its remedy. Changes nothing, and takes a second or two."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import queue
import resource
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from revdist.devices import build, nvml
from revdist.devices.allocator import load_allocator
from revdist.devices.ledger import devices_folder
from revdist.errors import DeviceError, DriverMissing, format_bytes

Status = Literal["ok", "warn", "fail"]
_GIB = 2**30
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_RESOLVE_TIMEOUT_S = 1.0
_NVIDIA_PCI_VENDOR = "0x10de"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    name: str
    status: Status
    """warn: training works, with less than it could have. fail: it does not, or not on this."""
    found: str
    remedy: str = ""
    """What to do about it; empty where it is ok."""


def examine_machine() -> list[Finding]:
    """Every check of this machine, in the order in which to mend."""
    checks: tuple[Callable[[], Finding], ...] = (
        check_driver,
        check_torch,
        check_allocator,
        check_devices_folder,
        check_shared_memory,
        check_open_files,
        check_loopback,
        check_host_name,
        check_clock,
    )
    return [check() for check in checks]


def check_driver() -> Finding:
    """The NVIDIA driver, and whether every GPU answers."""
    name = "NVIDIA driver"
    try:
        version, readings = nvml.driver_version(), nvml.read_devices()
    except DriverMissing as error:
        if _has_nvidia_hardware():
            return Finding(name=name, status="fail", found="an NVIDIA device, but no driver", remedy=str(error))
        return Finding(name=name, status="ok", found="none, and no NVIDIA device: there are CPU devices only")
    except DeviceError as error:
        return Finding(name=name, status="fail", found="does not answer", remedy=str(error))
    if failed := [reading for reading in readings if not reading.usable]:
        found = f"version {version}; {len(failed)} of {len(readings)} devices cannot be read"
        return Finding(name=name, status="fail", found=found, remedy="; ".join(reading.note for reading in failed))
    return Finding(name=name, status="ok", found=f"version {version}, {len(readings)} devices")


def check_torch() -> Finding:
    """torch's version, and whether it can use the GPUs there are."""
    version, cuda = importlib.metadata.version("torch"), _cuda_of_torch()
    found = f"{version}, {f'CUDA {cuda}' if cuda else 'CPU only'}"
    try:
        driver_cuda = nvml.cuda_version()
    except DeviceError:
        driver_cuda = None
    if driver_cuda is None:
        return Finding(name="torch", status="ok", found=found)
    if cuda is None:
        remedy = "install a build for CUDA: see https://pytorch.org/get-started/locally"
        return Finding(name="torch", status="fail", found=f"{found}, but there are GPUs", remedy=remedy)
    if int(cuda.split(".")[0]) > driver_cuda[0]:
        found = f"{found}, but the driver serves CUDA {driver_cuda[0]}.{driver_cuda[1]}"
        return Finding(name="torch", status="fail", found=found, remedy="update the NVIDIA driver")
    return Finding(name="torch", status="ok", found=found)


def check_allocator() -> Finding:
    """The allocator of CPU devices: compiled here, if it has not been before."""
    try:
        load_allocator()
    except DeviceError as error:
        found = f"the capacity of CPU devices is not enforced: {error}"
        return Finding(name="CPU allocator", status="warn", found=found, remedy="install g++ (apt-get install g++)")
    return Finding(name="CPU allocator", status="ok", found=f"compiled, in {build.cache_folder()}")


def check_devices_folder() -> Finding:
    """The folder of the CPU devices' ledgers."""
    try:
        folder = devices_folder()
    except (DeviceError, OSError) as error:
        remedy = "set REVDIST_DEVICES_DIR to a folder of yours"
        return Finding(name="CPU devices", status="fail", found=str(error), remedy=remedy)
    return Finding(name="CPU devices", status="ok", found=f"ledgers in {folder}")


def check_shared_memory(path: str = "/dev/shm") -> Finding:  # noqa: S108
    """Room for Ray's object store and for batches that data loader workers hand over."""
    name, remedy = "shared memory", "give it more: docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm"
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Finding(name=name, status="fail", found=f"no {path}: {error.strerror}", remedy=remedy)
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} in {path}"
    if usage.free < 64 * 2**20:
        return Finding(name=name, status="fail", found=found, remedy=remedy)
    if usage.free < _GIB:
        return Finding(name=name, status="warn", found=found, remedy=remedy)
    return Finding(name=name, status="ok", found=found)


def check_open_files() -> Finding:
    """The limit on open files: Ray takes some hundred per worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name, found = "open files", f"limit {soft} (may be raised to {hard})"
    if soft < 4096:
        status: Status = "warn" if soft >= 1024 else "fail"
        return Finding(name=name, status=status, found=found, remedy="ulimit -n 65536 in the shell that starts Ray")
    return Finding(name=name, status="ok", found=found)


def check_loopback() -> Finding:
    """Whether a port can be opened and reached on this machine."""
    name = "loopback"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(1)
            with socket.create_connection(server.getsockname(), timeout=1):
                server.accept()[0].close()
    except OSError as error:
        remedy = "bring up the interface lo, and let a firewall pass 127.0.0.1"
        return Finding(name=name, status="fail", found=f"127.0.0.1 cannot be reached: {error}", remedy=remedy)
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    return Finding(name=name, status="ok", found=f"free ports can be had, {first} to {last}")


def check_host_name() -> Finding:
    """Whether the host's own name is looked up fast: torch's process groups and Ray do so at every start."""
    host_name = socket.gethostname()
    name, remedy = "host name", f"add a line with this machine's address and {host_name} to /etc/hosts"
    answers: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()
    # A look-up cannot be interrupted, so a thread that nobody waits for does it.
    threading.Thread(target=_look_up, args=(host_name, answers), daemon=True).start()
    try:
        answer = answers.get(timeout=_RESOLVE_TIMEOUT_S)
    except queue.Empty:
        found = f"looking {host_name} up takes over {_RESOLVE_TIMEOUT_S:g} s"
        return Finding(name=name, status="warn", found=found, remedy=remedy)
    if isinstance(answer, OSError):
        return Finding(name=name, status="warn", found=f"{host_name} has no address: {answer}", remedy=remedy)
    alone = ", which other hosts cannot reach" if answer.startswith("127.") else ""
    return Finding(name=name, status="ok", found=f"{host_name} is {answer}{alone}")


def check_clock() -> Finding:
    """Whether the clock is set by a time service: events of several hosts are ordered by it."""
    timex = ctypes.create_string_buffer(1024)  # all zero: read, set nothing
    state = ctypes.CDLL(None).adjtimex(timex)
    if state == _TIME_ERROR:
        remedy = "run chrony or systemd-timesyncd on every host of a cluster"
        return Finding(name="clock", status="warn", found="not synchronised by a time service", remedy=remedy)
    return Finding(name="clock", status="ok", found="synchronised" if state >= 0 else "cannot be asked here")


def _look_up(host_name: str, answers: queue.SimpleQueue[str | OSError]) -> None:
    try:
        answers.put(socket.gethostbyname(host_name))
    except OSError as error:
        answers.put(error)


def _has_nvidia_hardware() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text(encoding="ascii").strip() != _NVIDIA_PCI_VENDOR:
            continue
        if vendor.with_name("class").read_text(encoding="ascii").startswith("0x03"):  # a display controller
            return True
    return False


def _cuda_of_torch() -> str | None:
    """The CUDA version that torch was built for, read without importing torch."""
    spec = importlib.util.spec_from_file_location("torch_version", build.torch_folder() / "version.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda: str | None = module.cuda
    return cuda

"""The CUDA device without a GPU: NVML is the fake driver's, torch.cuda a stand-in. Nothing here shows a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fake_driver import FakeDriver

from revdist import errors
from revdist.devices import build, cuda_shortage, open_device
from revdist.devices.cpu import CpuDevice
from revdist.devices.cuda import torch_index

MIB = 2**20
MakeDevice = Callable[..., CpuDevice]


@contextlib.contextmanager
def torch_sees(*uuids: str, initialized: bool = False) -> Iterator[list[int]]:
    """torch.cuda with those devices, in its own order; gives the indexes that were set."""
    import torch  # here, since not every child process of these tests needs it

    chosen: list[int] = []

    def properties(index: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(uuid=uuids[index].removeprefix("GPU-").removeprefix("MIG-"))

    with mock.patch.multiple(
        torch.cuda,
        is_initialized=lambda: initialized,
        device_count=lambda: len(uuids),
        get_device_properties=properties,
        set_device=chosen.append,
        memory_allocated=lambda index: 100 + index,
        max_memory_allocated=lambda index: 200 + index,
        mem_get_info=lambda index: (30 + index, 100 + index),
    ):
        yield chosen


def test_torch_numbers_devices_in_another_order() -> None:
    with torch_sees("GPU-fast", "GPU-slow"):
        assert torch_index("GPU-slow") == 1
        with pytest.raises(errors.DeviceNotFound, match=r"torch sees 2 CUDA devices.*CUDA_VISIBLE_DEVICES"):
            torch_index("GPU-other")


def test_an_instance_may_carry_its_gpus_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a")
    with torch_sees("GPU-parent"):
        assert torch_index("MIG-a") == 0


def _activate(gpu: str) -> list[tuple[Any, ...]]:
    seen = []
    for uuids, initialized in (((gpu,), False), (("GPU-x", gpu), True)):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        with torch_sees(*uuids, initialized=initialized) as chosen:
            device = open_device(uuid=gpu)
            device.activate()
            meter = device.meter()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            seen.append((chosen, visible, str(device.torch_device), meter.allocated_bytes(), meter.peak_bytes()))
    return seen


def test_a_device_is_activated_by_its_uuid(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    fresh, initialized = fake_driver.call(_activate, gpu)
    assert fresh == ([0], gpu, "cuda:0", 100, 200)
    # CUDA has looked at the environment already: the device is found among those it sees.
    assert initialized == ([1], None, "cuda:1", 101, 201)


def _meter_before_activate(gpu: str) -> None:
    open_device(uuid=gpu).meter()


def test_a_meter_needs_an_active_device(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    with pytest.raises(errors.DeviceError, match="activate"):
        fake_driver.call(_meter_before_activate, gpu)


def _read_through_torch(driver: FakeDriver, gpu: str) -> tuple[int, int]:
    with torch_sees(gpu):
        device = open_device(uuid=gpu)
        device.activate()
        driver.fail("not-supported", function="nvmlDeviceGetMemoryInfo")
        reading = device.read()
        return reading.free_bytes, reading.total_bytes


def test_memory_that_nvml_does_not_report_is_read_through_torch(
    fake_driver: FakeDriver, ledger_device: MakeDevice
) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    assert fake_driver.call(_read_through_torch, fake_driver, gpu) == (30, 100)


def _first_gpu() -> str:
    return open_device(kind="cuda").uuid


def test_the_first_gpu_that_works_is_the_default(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    path = ledger_device(80 * MIB).ledger_path
    lost, fine = fake_driver.add_gpu(path), fake_driver.add_gpu(path)
    fake_driver.fail("gpu-is-lost", device=lost)
    assert fake_driver.call(_first_gpu) == fine


def test_a_cuda_device_has_the_capacity_it_has() -> None:
    with pytest.raises(errors.UsageError, match="by its uuid"):
        open_device(kind="cuda", capacity_bytes=2**30)


def test_without_leave_a_shortage_on_cuda_is_met_by_redoing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REVDIST_CUDA_SHORTAGE", raising=False)
    assert not cuda_shortage.register(lambda missing_bytes: 0)


def test_where_it_cannot_be_compiled_a_shortage_is_met_by_redoing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REVDIST_CUDA_SHORTAGE", "1")
    monkeypatch.setenv("REVDIST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert not cuda_shortage.register(lambda missing_bytes: 0)
    assert "redoing the micro-batch" in caplog.text


def _meet_shortages(library: str) -> tuple[bool, list[int], list[int]]:
    os.environ |= {"REVDIST_CUDA_SHORTAGE": "1", "LIBRARY_PATH": str(Path(library).parent)}
    ctypes.CDLL(str(build.torch_folder() / "lib" / "libc10.so"))  # as torch has, before a CUDA device is active
    fake = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    asked: list[int] = []
    registered = cuda_shortage.register(lambda missing_bytes: asked.append(missing_bytes) or missing_bytes)
    outcomes = []
    for free_bytes in (2**30, 10 * MIB):  # plenty: the driver will serve it
        ctypes.c_size_t.in_dll(fake, "fake_free_bytes").value = free_bytes
        outcomes.append(fake.fake_cache_miss())
    cuda_shortage.register(None)
    outcomes.append(fake.fake_cache_miss())
    return registered, outcomes, asked


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
def test_the_callback_is_registered_with_the_caching_allocator(fake_driver: FakeDriver, tmp_path: Path) -> None:
    library = tmp_path / "libc10_cuda.so"
    source = Path(__file__).with_name("fake_c10_cuda.cpp")
    torch_folder = build.torch_folder()
    command = [str(build.find_compiler()), "-std=c++20", "-shared", "-fPIC", f"-isystem{torch_folder / 'include'}"]
    command += [str(source), f"-L{torch_folder / 'lib'}", "-lc10", "-Wl,-soname,libc10_cuda.so", "-o", str(library)]
    subprocess.run(command, check=True)
    assert fake_driver.call(_meet_shortages, str(library)) == (True, [0, 1, 0], [54 * MIB])

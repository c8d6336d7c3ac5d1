"""The CUDA device without a GPU: NVML is the fake driver's, torch.cuda a stand-in. Nothing here shows a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
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


def _activate(gpu: str, initialized: bool) -> tuple[list[int], str, str, list[int], str]:
    seen = ("GPU-x", gpu) if initialized else (gpu,)
    with torch_sees(*seen, initialized=initialized) as chosen:
        device = open_device(uuid=gpu)
        with contextlib.suppress(errors.DeviceError):
            device.meter()
            raise AssertionError("a meter before activate")
        device.activate()
        meter = device.meter()
        counters = [meter.allocated_bytes(), meter.peak_bytes()]
        return chosen, os.environ.get("CUDA_VISIBLE_DEVICES", ""), str(device.torch_device), counters, device.name


def test_a_device_is_activated_by_its_uuid(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    name = "NVIDIA A100-SXM4-40GB"
    assert fake_driver.call(_activate, gpu, False) == ([0], gpu, "cuda:0", [100, 200], name)
    # CUDA has looked at the environment already: the device is found among those it sees.
    assert fake_driver.call(_activate, gpu, True) == ([1], "", "cuda:1", [101, 201], name)


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

"""The doctor: what it finds on a machine that lacks something."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_driver import FakeDriver

from revdist.devices import allocator, doctor
from revdist.devices.build import CompilerMissing
from revdist.devices.cpu import CpuDevice

MIB = 2**20
MakeDevice = Callable[..., CpuDevice]


def test_every_check_reports_and_every_trouble_has_a_remedy(devices_folder: Path) -> None:
    findings = doctor.examine_machine()
    assert len({finding.name for finding in findings}) == len(findings) == 9
    for finding in findings:
        assert finding.found
        assert bool(finding.remedy) == (finding.status != "ok")


def test_a_doctor_needs_no_torch() -> None:
    code = "import sys; from revdist.devices.doctor import examine_machine; examine_machine(); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "ray"} & set(printed.split())


def test_gpus_that_answer_are_counted(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    finding = fake_driver.call(doctor.check_driver)
    assert (finding.status, finding.found) == ("ok", "version 550.54.15, 1 devices")


@pytest.mark.parametrize(
    ("error", "function", "remedy"),
    [
        ("mismatch", "", "kernel module"),
        ("no-permission", "", "/dev/nvidia"),
        ("gpu-is-lost", "nvmlDeviceGetMemoryInfo", "reboot"),
    ],
)
def test_a_driver_in_trouble_fails(
    fake_driver: FakeDriver, ledger_device: MakeDevice, error: str, function: str, remedy: str
) -> None:
    fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    fake_driver.fail(error, function=function)
    finding = fake_driver.call(doctor.check_driver)
    assert finding.status == "fail"
    assert remedy in finding.remedy


def test_an_nvidia_device_without_a_driver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_nvidia_hardware", lambda: True)
    finding = doctor.check_driver()
    assert (finding.status, finding.found) == ("fail", "an NVIDIA device, but no driver")
    assert "install the NVIDIA driver" in finding.remedy


@pytest.mark.parametrize(
    ("built_for", "served", "status", "found"),
    [
        (None, (12, 4), "fail", "but there are GPUs"),
        ("13.0", (12, 4), "fail", "the driver serves CUDA 12.4"),
        ("12.6", (12, 4), "ok", "CUDA 12.6"),  # within a major version the driver need not be newer
        ("12.6", (13, 0), "ok", "CUDA 12.6"),
    ],
)
def test_torch_must_fit_the_driver(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, served: tuple[int, int], status: str, found: str
) -> None:
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: built_for)
    monkeypatch.setattr(doctor.nvml, "cuda_version", lambda: served)
    finding = doctor.check_torch()
    assert finding.status == status
    assert found in finding.found
    assert importlib.metadata.version("torch") in finding.found


def test_the_drivers_cuda_is_read(fake_driver: FakeDriver) -> None:
    assert fake_driver.call(doctor.nvml.cuda_version) == (12, 4)


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> allocator.NativeAllocator:
        raise CompilerMissing("no C++ compiler: install g++ or set CXX")

    monkeypatch.setattr(doctor, "load_allocator", refuse)
    finding = doctor.check_allocator()
    assert finding.status == "warn"
    assert "not enforced" in finding.found


@pytest.mark.parametrize(("free_bytes", "status"), [(10 * MIB, "fail"), (500 * MIB, "warn"), (2000 * MIB, "ok")])
def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: int, status: str) -> None:
    usage = types.SimpleNamespace(total=2**32, used=0, free=free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert doctor.check_shared_memory().status == status


def test_no_shared_memory_fails(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(str(tmp_path / "none")).status == "fail"


@pytest.mark.parametrize(("limit", "status"), [(256, "fail"), (1024, "warn"), (65536, "ok")])
def test_a_low_limit_on_open_files(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, 65536))
    assert doctor.check_open_files().status == status


def test_a_loopback_that_is_down_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: object, timeout: float) -> socket.socket:
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert doctor.check_loopback().status == "fail"


def test_a_host_name_without_an_address_or_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "gethostbyname", fail)
    assert doctor.check_host_name().status == "warn"
    monkeypatch.setattr(doctor, "_RESOLVE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: time.sleep(0.3))
    assert "takes over" in doctor.check_host_name().found


def test_a_devices_folder_of_another_user_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REVDIST_DEVICES_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert doctor.check_devices_folder().status == "fail"

"""Devices for every test: CPU devices in folders of their own, and a fake NVIDIA driver over them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_driver import FakeDriver, build_library

from revdist.devices.cpu import CpuDevice

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has its background jobs ignore Ctrl-C, and commands that tests press it for would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def devices_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's ledgers lie, in this process and those it starts."""
    folder = tmp_path / "devices"
    monkeypatch.setenv("REVDIST_DEVICES_DIR", str(folder))
    return folder


@pytest.fixture
def ledger_device(devices_folder: Path) -> Iterator[Callable[..., CpuDevice]]:
    """Makes CPU devices: `ledger_device(capacity_bytes, name="cpu-0")`. Active ones are deactivated at the end."""
    made: list[CpuDevice] = []

    def make(capacity_bytes: int, name: str = "cpu-0") -> CpuDevice:
        made.append(CpuDevice.open(name, capacity_bytes=capacity_bytes))
        return made[-1]

    yield make
    for device in made:
        device.deactivate()


@pytest.fixture(scope="session")
def fake_driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fake libnvidia-ml.so.1."""
    if shutil.which("gcc") is None:
        pytest.skip("the fake NVIDIA driver needs gcc")
    folder = tmp_path_factory.mktemp("fake-driver")
    build_library(folder)
    return folder


@pytest.fixture
def fake_driver(fake_driver_library: Path, devices_folder: Path, tmp_path: Path) -> FakeDriver:
    """A driver without devices yet: `fake_driver.add_gpu(ledger_device(2**30).ledger_path)`."""
    return FakeDriver(fake_driver_library, tmp_path)

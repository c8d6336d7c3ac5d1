"""The CPU device between processes: neighbours, forks, deaths, and a machine without a compiler."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data

from revdist.devices import build
from revdist.devices.allocator import load_allocator
from revdist.devices.co_tenant import CoTenant, main
from revdist.devices.cpu import CpuDevice

MIB = 2**20
torch.set_num_threads(1)  # an OpenMP pool does not survive a fork
MakeDevice = Callable[..., CpuDevice]
StartTenant = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_tenant() -> Iterator[StartTenant]:
    """Starts a co-tenant and waits until it holds its memory."""
    started: list[subprocess.Popen[str]] = []

    def start(device: str, take: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "revdist.devices.co_tenant", "--device", device, "--take", take, *more]
        tenant = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(tenant)
        assert tenant.stdout is not None
        assert f"holds {take[:-3]}.0 MiB of {device}" in tenant.stdout.readline()
        return tenant

    yield start
    for tenant in started:
        tenant.kill()
        tenant.wait()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def test_a_co_tenants_memory_is_missing_here(ledger_device: MakeDevice, start_tenant: StartTenant) -> None:
    device = ledger_device(64 * MIB)
    device.activate("trainer")
    tenant = start_tenant("cpu-0", "20MiB")
    reading = device.read()
    assert reading.free_bytes == 44 * MIB
    assert [(holder.pid, holder.name) for holder in reading.holders] == [(tenant.pid, "co-tenant")]
    with pytest.raises(torch.OutOfMemoryError, match=rf"Process {tenant.pid} \(co-tenant\) holds 20.0 MiB"):
        torch.empty(50 * MIB, dtype=torch.uint8)


@pytest.mark.parametrize("end", ["input", "SIGTERM", "seconds"])
def test_a_co_tenant_gives_back(ledger_device: MakeDevice, start_tenant: StartTenant, end: str) -> None:
    device = ledger_device(64 * MIB)
    tenant = start_tenant("cpu-0", "20MiB", *(["--seconds", "0.1"] if end == "seconds" else []))
    if end == "input":
        assert tenant.stdin is not None
        tenant.stdin.close()
    elif end == "SIGTERM":
        tenant.terminate()
    assert tenant.wait(10) == 0
    assert device.read().free_bytes == 64 * MIB


def test_a_killed_co_tenants_memory_can_be_had(ledger_device: MakeDevice, start_tenant: StartTenant) -> None:
    device = ledger_device(64 * MIB)
    device.activate()
    tenant = start_tenant("cpu-0", "40MiB")
    tenant.kill()
    wait_until(lambda: device.read().free_bytes == 64 * MIB)  # and nobody has collected it yet
    assert torch.empty(64 * MIB, dtype=torch.uint8).nbytes == 64 * MIB


def test_a_stopped_co_tenant_blocks_nobody(ledger_device: MakeDevice, start_tenant: StartTenant) -> None:
    device = ledger_device(64 * MIB)
    device.activate()
    tenant = start_tenant("cpu-0", "40MiB")
    os.kill(tenant.pid, signal.SIGSTOP)
    torch.empty(24 * MIB, dtype=torch.uint8)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(25 * MIB, dtype=torch.uint8)
    os.kill(tenant.pid, signal.SIGCONT)


def test_a_co_tenant_waits_for_memory(ledger_device: MakeDevice) -> None:
    device = ledger_device(64 * MIB)
    device.activate()
    held = torch.empty(60 * MIB, dtype=torch.uint8)
    command = [sys.executable, "-m", "revdist.devices.co_tenant", "--device", "cpu-0", "--take", "20MiB"]
    tenant = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: device.read().free_bytes == 0)
    del held
    output, _ = tenant.communicate(timeout=10)
    assert "holds 20.0 MiB" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "cpu-0", "--take", "65MiB", "--patience", "0.05"], 1, "got 64.0 MiB of 65.0 MiB on cpu-0"),
        (["--device", "cpu-7", "--take", "1MiB"], 1, "no CPU device 'cpu-7'"),
        (["--device", "cpu-0", "--take", "much"], 2, "'much' is not a size"),
    ],
)
def test_a_co_tenant_that_cannot_says_so(
    ledger_device: MakeDevice, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    device = ledger_device(64 * MIB)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert main(arguments) == code
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert message in capsys.readouterr().err
    assert device.read().used_bytes == 0


def _contend(start: Any, units: Any, most: Any, failures: Any) -> None:
    """Takes units of 10 kB and gives them back as fast as it can, counting those that are out at once."""
    CpuDevice.open("cpu-0").activate()
    allocator = load_allocator()
    start.wait()
    for _ in range(1000):
        addresses = [address for _ in range(4) if (address := allocator.take(10_000)) is not None]
        with units.get_lock():  # raised after the take and lowered before the return: never more than are out
            units.value += len(addresses)
            most.value = max(most.value, units.value)
            failures.value += 4 - len(addresses)
        with units.get_lock():
            units.value -= len(addresses)
        for address in addresses:
            allocator.give_back(address)


def test_processes_together_never_exceed_the_capacity(ledger_device: MakeDevice) -> None:
    device = ledger_device(45_000)
    tenant = CoTenant(device)
    tenant.take(20_000, patience_s=1)  # leaves two units for the others
    fork = multiprocessing.get_context("fork")
    units, most, failures = (fork.Value("l", 0) for _ in range(3))
    start = fork.Barrier(3)
    processes = [fork.Process(target=_contend, args=(start, units, most, failures)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert most.value == 2
    assert failures.value >= 3 * 1000 * 2  # of four units wanted, each time
    assert device.read().used_bytes == 20_000
    tenant.give_back()


class _Fresh(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((MIB,), index, dtype=torch.uint8)


def test_workers_of_a_data_loader_are_not_charged(ledger_device: MakeDevice) -> None:
    device = ledger_device(64 * MIB)
    device.activate()
    held = torch.ones(40 * MIB, dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(_Fresh(), batch_size=4, num_workers=2)
    for batch in loader:
        assert batch.shape == (4, MIB)
        assert [holder.pid for holder in device.read().holders] == [os.getpid()]
        assert device.read().used_bytes >= held.nbytes
    del batch
    assert device.read().used_bytes == held.nbytes


def test_a_forked_child_frees_nothing_of_its_parents(ledger_device: MakeDevice) -> None:
    device = ledger_device(64 * MIB)
    device.activate()
    tensors = [torch.ones(MIB, dtype=torch.uint8) for _ in range(8)]
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        fine = False
        try:
            tensors.clear()
            fresh = torch.ones(2 * MIB, dtype=torch.uint8)
            fine = not device.enforced and device.meter().allocated_bytes() == 0 and fresh.nbytes == 2 * MIB
            device.activate("child")  # it may join the device by itself
            own = torch.ones(4 * MIB, dtype=torch.uint8)
            fine = fine and device.meter().allocated_bytes() == own.nbytes and device.read().used_bytes == 12 * MIB
        finally:
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert device.read().used_bytes == 8 * MIB
    assert device.meter().allocated_bytes() == 8 * MIB


def _build_in(folder: str) -> tuple[str, float]:
    os.environ["REVDIST_CACHE_DIR"] = folder
    path = build.build("allocator.cpp")
    return str(path), path.stat().st_mtime


def test_processes_that_compile_at_once_compile_once(tmp_path: Path) -> None:
    with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as processes:
        results = set(processes.map(_build_in, [str(tmp_path)] * 4))
    assert len(results) == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".so"]


_WITHOUT_COMPILER = """
import torch
from revdist.devices.cpu import CpuDevice
device = CpuDevice.open('cpu-0')
device.activate('slow')
meter = device.meter()
before = meter.allocated_bytes()
meter.reset_peak()
tensor = torch.ones(20 * 2**20, dtype=torch.uint8)
again = torch.ones(20 * 2**20, dtype=torch.uint8)
del again
reading = device.read()
print(meter.exact, meter.allocated_bytes() - before, meter.peak_bytes() - before, reading.holders[0].name)
print(reading.note)
torch.ones(100 * 2**20, dtype=torch.uint8)
"""


@pytest.mark.parametrize("trouble", ["none", "broken"])
def test_without_a_compiler_a_device_works_and_says_so(ledger_device: MakeDevice, tmp_path: Path, trouble: str) -> None:
    ledger_device(64 * MIB)
    env = {**os.environ, "REVDIST_CACHE_DIR": str(tmp_path / "cache")}
    env["CXX"] = "/nowhere/c++" if trouble == "none" else "false"
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_COMPILER], env=env, capture_output=True, text=True, check=True
    )
    exact, allocated, peak, name = done.stdout.splitlines()[0].split()
    assert (exact, name) == ("False", "slow")
    assert 18 * MIB < int(allocated) < 30 * MIB
    assert 38 * MIB < int(peak) < 60 * MIB
    assert "not enforced on 1 process" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "device cpu-0 works, but its capacity is not enforced" in done.stderr


def test_a_co_tenant_without_a_compiler_is_seen_as_well(
    ledger_device: MakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_tenant: StartTenant
) -> None:
    device = ledger_device(64 * MIB)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("REVDIST_CACHE_DIR", str(tmp_path / "cache"))
    tenant = start_tenant("cpu-0", "20MiB")
    assert 30 * MIB < device.read().free_bytes <= 45 * MIB
    tenant.terminate()
    assert tenant.wait(10) == 0
    assert device.read().free_bytes == 64 * MIB


def test_a_co_tenant_can_be_played_within_a_process(ledger_device: MakeDevice) -> None:
    device = ledger_device(64 * MIB)
    tenant = CoTenant(device)
    tenant.take(3 * MIB + 5, patience_s=1)
    assert device.read().used_bytes == tenant.held_bytes == 3 * MIB + 5
    tenant.give_back()
    assert device.read().used_bytes == 0


def test_a_device_is_reserved_by_one_process_until_it_ends(devices_folder: Path) -> None:
    device = CpuDevice.open("cpu-0", capacity_bytes=2**20)
    script = "from revdist.devices.cpu import CpuDevice; print(CpuDevice.open('cpu-0').reserve())"

    def other() -> str:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    assert other() == "True"  # and it has ended
    assert device.reserve()
    assert device.reserve()
    assert other() == "False"

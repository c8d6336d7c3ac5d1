"""NVML through the unchanged nvidia-ml-py, on a driver library whose memory is a ledger."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_driver import FakeDriver

from revdist import errors
from revdist.devices import Reading, list_devices, nvml, open_device
from revdist.devices.cpu import CpuDevice
from revdist.devices.xid import Xid

MIB = 2**20
MakeDevice = Callable[..., CpuDevice]


def test_a_gpu_is_read_by_its_uuid(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    first = fake_driver.add_gpu(ledger_device(80 * MIB, "a").ledger_path)
    second = fake_driver.add_gpu(ledger_device(40 * MIB, "b").ledger_path, name="NVIDIA H100 80GB HBM3")
    reading = fake_driver.call(nvml.read_device, second)
    assert (reading.uuid, reading.name, reading.kind, reading.index) == (second, "NVIDIA H100 80GB HBM3", "cuda", 1)
    assert (reading.total_bytes, reading.free_bytes, reading.used_bytes) == (40 * MIB, 40 * MIB, 0)
    assert reading.usable
    assert fake_driver.call(nvml.read_device, first).index == 0


def _hold_and_read(folder: str, num_bytes: int) -> tuple[int, list[Reading]]:
    os.environ["REVDIST_DEVICES_DIR"] = folder
    from revdist.devices.co_tenant import CoTenant

    tenant = CoTenant(CpuDevice.open("a"))
    tenant.take(num_bytes, patience_s=1)
    return os.getpid(), nvml.read_devices()


def test_a_reading_names_who_holds_the_memory(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    device = ledger_device(80 * MIB, "a")
    fake_driver.add_gpu(device.ledger_path)
    pid, (reading,) = fake_driver.call(_hold_and_read, str(device.ledger_path.parent), 20 * MIB)
    (holder,) = reading.holders
    assert (holder.pid, holder.used_bytes) == (pid, 20 * MIB)
    assert holder.name  # the process is ours to see, so its program is named
    assert reading.free_bytes == 60 * MIB
    (after,) = fake_driver.call(nvml.read_devices)  # that process is gone
    assert after.free_bytes == 80 * MIB
    assert after.holders == ()


def test_instances_stand_in_for_the_gpu_that_mig_splits(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    whole = fake_driver.add_gpu(ledger_device(80 * MIB, "a").ledger_path)
    split = fake_driver.add_gpu(ledger_device(80 * MIB, "b").ledger_path)
    instances = [fake_driver.add_mig(split, ledger_device(n * MIB, f"mig-{n}").ledger_path) for n in (10, 20)]
    readings = fake_driver.call(nvml.read_devices)
    assert [r.uuid for r in readings] == [whole, *instances]
    assert [r.total_bytes for r in readings] == [80 * MIB, 10 * MIB, 20 * MIB]
    assert [r.index for r in readings] == [0, 1, 1]
    assert fake_driver.call(nvml.read_device, instances[1]).total_bytes == 20 * MIB
    with pytest.raises(errors.DeviceError, match="split by MIG"):
        fake_driver.call(nvml.read_device, split)
    memory_reads = {device for function, device in fake_driver.calls() if function == "nvmlDeviceGetMemoryInfo"}
    assert memory_reads == {whole, *instances}  # never the parent


@pytest.mark.parametrize(
    ("error", "expected", "remedy"),
    [
        ("gpu-is-lost", errors.DeviceLost, "reboot"),
        ("reset-required", errors.DeviceLost, "gpu-reset"),
        ("not-supported", errors.NotSupportedByDevice, "torch"),
        ("function-not-found", errors.NotSupportedByDevice, "update the NVIDIA driver"),
        ("no-permission", errors.DeviceError, "/dev/nvidia"),
        ("not-found", errors.DeviceNotFound, "revdist devices"),
        ("unknown", errors.DeviceError, "nvidia-smi"),
    ],
)
def test_every_error_of_a_device_is_ours_with_a_remedy(
    fake_driver: FakeDriver, ledger_device: MakeDevice, error: str, expected: type, remedy: str
) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    fake_driver.fail(error, device=gpu, function="nvmlDeviceGetMemoryInfo")
    with pytest.raises(errors.DeviceError, match=remedy) as caught:
        fake_driver.call(nvml.read_device, gpu)
    assert type(caught.value) is expected
    assert gpu in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"), [("driver-not-loaded", errors.DriverMissing), ("mismatch", errors.DriverMismatch)]
)
def test_a_driver_that_does_not_start(fake_driver: FakeDriver, error: str, expected: type) -> None:
    fake_driver.fail(error)
    with pytest.raises(expected):
        fake_driver.call(nvml.driver_version)
    (reading,) = fake_driver.call(list_devices)  # the host, as the one device there is
    assert reading.kind == "cpu"


def test_no_library_is_a_machine_without_gpus(devices_folder: Path) -> None:
    with pytest.raises(errors.DriverMissing, match="kind cpu"):
        nvml.read_devices()
    (reading,) = list_devices()
    assert (reading.name, reading.kind) == ("cpu-0", "cpu")
    assert 0 < reading.free_bytes <= reading.total_bytes


def test_an_unknown_uuid_is_not_found(fake_driver: FakeDriver) -> None:
    with pytest.raises(errors.DeviceNotFound, match="GPU-nowhere"):
        fake_driver.call(nvml.read_device, "GPU-nowhere")


def test_one_lost_gpu_does_not_hide_the_others(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    lost = fake_driver.add_gpu(ledger_device(80 * MIB, "a").ledger_path)
    fine = fake_driver.add_gpu(ledger_device(40 * MIB, "b").ledger_path)
    fake_driver.fail("gpu-is-lost", device=lost)
    gone, good = fake_driver.call(nvml.read_devices)
    assert not gone.usable
    assert "lost" in gone.note
    assert (good.uuid, good.note) == (fine, "")


def test_a_device_without_a_process_list_is_read_with_a_note(
    fake_driver: FakeDriver, ledger_device: MakeDevice
) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    fake_driver.fail("no-permission", function="nvmlDeviceGetComputeRunningProcesses_v3")
    reading = fake_driver.call(nvml.read_device, gpu)
    assert reading.free_bytes == 80 * MIB
    assert "who holds its memory is unknown" in reading.note


def _read_after_another_library_shut_nvml_down(gpu: str) -> Reading:
    import pynvml

    nvml.read_device(gpu)
    pynvml.nvmlShutdown()
    return nvml.read_device(gpu)


def test_nvml_shut_down_by_another_library_is_started_again(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    assert fake_driver.call(_read_after_another_library_shut_nvml_down, gpu).uuid == gpu


def _watch(driver: FakeDriver, gpu: str, other: str) -> tuple[list[Xid], list[Xid], float]:
    watch = nvml.XidWatch(gpu)
    start_s = time.monotonic()
    before = watch.poll(timeout_s=0.05)
    waited_s = time.monotonic() - start_s
    driver.report_xid(other, 79)
    driver.report_xid(gpu, 31)
    driver.report_xid(gpu, 79)
    found = watch.poll(timeout_s=5)
    watch.close()
    return before, found, waited_s


def test_xids_of_the_watched_device_are_reported_once(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    path = ledger_device(80 * MIB).ledger_path
    gpu, other = fake_driver.add_gpu(path), fake_driver.add_gpu(path)
    before, found, waited_s = fake_driver.call(_watch, fake_driver, gpu, other)
    assert before == []
    assert waited_s >= 0.05
    assert [(xid.uuid, xid.number, xid.loses_device) for xid in found] == [(gpu, 31, False), (gpu, 79, True)]
    assert "bus" in found[1].meaning


def _read_until_lost(driver: FakeDriver, uuid: str, gpu: str, number: int) -> Reading:
    device = open_device(uuid=uuid)
    assert device.read().usable
    driver.report_xid(gpu, number)
    with contextlib.suppress(errors.DeviceLost):
        device.read()
    return device.read()  # what is lost stays lost


def test_a_device_is_lost_by_an_xid_before_it_stops_answering(
    fake_driver: FakeDriver, ledger_device: MakeDevice
) -> None:
    path = ledger_device(80 * MIB).ledger_path
    gpu, split = fake_driver.add_gpu(path), fake_driver.add_gpu(path)
    instance = fake_driver.add_mig(split, path)
    assert "Xid 13, an error of the program" in fake_driver.call(_read_until_lost, fake_driver, gpu, gpu, 13).note
    assert "Xid 63, memory row" in fake_driver.call(_read_until_lost, fake_driver, gpu, gpu, 63).note
    with pytest.raises(errors.DeviceLost, match=r"Xid 79.*bus"):
        fake_driver.call(_read_until_lost, fake_driver, gpu, gpu, 79)
    with pytest.raises(errors.DeviceLost, match="Xid 95"):  # an instance goes down with its GPU
        fake_driver.call(_read_until_lost, fake_driver, instance, split, 95)


def test_devices_that_report_no_errors_are_read_all_the_same(
    fake_driver: FakeDriver, ledger_device: MakeDevice
) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB).ledger_path)
    fake_driver.fail("not-supported", function="nvmlDeviceRegisterEvents")
    assert fake_driver.call(_read_until_lost, fake_driver, gpu, gpu, 79).usable


def test_gpus_and_cpu_devices_are_listed_together(fake_driver: FakeDriver, ledger_device: MakeDevice) -> None:
    gpu = fake_driver.add_gpu(ledger_device(80 * MIB, "cpu-10").ledger_path)
    ledger_device(40 * MIB, "cpu-2")
    assert [r.name if r.kind == "cpu" else r.uuid for r in fake_driver.call(list_devices)] == [gpu, "cpu-2", "cpu-10"]

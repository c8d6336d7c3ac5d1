"""The CPU device in one process: what is charged, what happens past the capacity, and who is asked for memory."""

from __future__ import annotations

import ctypes
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from revdist.devices import host, open_device
from revdist.devices.allocator import load_allocator
from revdist.devices.cpu import CpuDevice
from revdist.errors import DeviceError

MIB = 2**20
MakeDevice = Callable[..., CpuDevice]
torch.set_num_threads(1)


def mebibytes(number: float) -> torch.Tensor:
    return torch.empty(int(number * MIB), dtype=torch.uint8)


@pytest.fixture
def device(ledger_device: MakeDevice) -> Iterator[CpuDevice]:
    gc.collect()
    made = ledger_device(64 * MIB)
    made.activate("tests")
    yield made
    made.on_shortage(None)


def test_every_storage_is_charged_once(device: CpuDevice) -> None:
    meter = device.meter()
    assert meter.exact
    assert meter.allocated_bytes() == 0
    tensor = mebibytes(8)
    views = [tensor[10:], tensor.view(-1, 2), tensor.detach()]
    assert meter.allocated_bytes() == 8 * MIB
    copy = tensor.clone()
    assert meter.allocated_bytes() == 16 * MIB
    del tensor, copy
    assert meter.allocated_bytes() == 8 * MIB  # the views hold it
    del views
    assert meter.allocated_bytes() == 0
    assert torch.empty(0).numel() == 0


def test_odd_sizes_are_charged_to_the_byte(device: CpuDevice) -> None:
    tensor = torch.empty(12_345, dtype=torch.uint8)
    assert device.meter().allocated_bytes() == 12_345
    tensor.untyped_storage().resize_(54_321)
    assert device.meter().allocated_bytes() == 54_321


def test_the_peak_lasts_until_it_is_reset(device: CpuDevice) -> None:
    meter = device.meter()
    meter.reset_peak()
    tensor = mebibytes(8)
    mebibytes(16)
    assert meter.peak_bytes() == 24 * MIB
    meter.reset_peak()
    assert meter.peak_bytes() == 8 * MIB
    del tensor


def test_a_reading_shows_this_process(device: CpuDevice) -> None:
    tensor = mebibytes(8)
    reading = device.read()
    assert (reading.name, reading.kind, reading.uuid) == ("cpu-0", "cpu", device.uuid)
    assert (reading.total_bytes, reading.free_bytes, reading.used_bytes) == (64 * MIB, 56 * MIB, tensor.nbytes)
    assert [(holder.name, holder.used_bytes) for holder in reading.holders] == [("tests", 8 * MIB)]


def test_past_the_capacity_is_out_of_memory_as_on_a_gpu(device: CpuDevice) -> None:
    held = mebibytes(60)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        mebibytes(5)
    message = str(caught.value)
    for part in ("cpu-0", "5.0 MiB wanted", "4.0 MiB free of 64.0 MiB", "tests) holds 60.0 MiB", "Lower micro_batch"):
        assert part in message
    assert device.meter().allocated_bytes() == held.nbytes  # the failure left no trace
    assert mebibytes(4).nbytes == 4 * MIB  # the last byte can be had


def test_a_device_filled_to_zero_goes_on(device: CpuDevice) -> None:
    for _ in range(20):
        held = [mebibytes(1) for _ in range(64)]
        with pytest.raises(torch.OutOfMemoryError):
            mebibytes(1)
        assert device.read().free_bytes == 0
        held.clear()
        assert device.read().free_bytes == 64 * MIB


def test_freed_blocks_are_used_again_and_count_as_free(device: CpuDevice) -> None:
    """Given back to the system they would cost a page fault for every 4 KiB when they come back."""
    kept_bytes = load_allocator().kept_bytes
    tensor = mebibytes(8)
    address = tensor.data_ptr()
    del tensor
    assert kept_bytes() == 8 * MIB
    assert device.meter().allocated_bytes() == 0
    assert device.read().free_bytes == 64 * MIB
    again = mebibytes(8)
    assert again.data_ptr() == address
    assert kept_bytes() == 0
    del again
    device.deactivate()
    assert kept_bytes() == 0


def test_no_more_is_kept_than_a_quarter_beyond_what_was_needed_at_once(device: CpuDevice) -> None:
    kept_bytes = load_allocator().kept_bytes
    most = needed = 0
    for size in (4, 1, 6, 3, 16, 2, 5, 24, 7, 1):
        tensor = mebibytes(size)
        most = max(most, device.meter().allocated_bytes() + kept_bytes())
        needed = max(needed, size * MIB)
        del tensor
    # Blocks of an earlier test in this process may have been larger.
    assert most <= max(needed, 64 * MIB) * 1.25
    assert kept_bytes() > 0


def test_small_blocks_are_left_to_malloc(device: CpuDevice) -> None:
    torch.empty(16 * 1024, dtype=torch.uint8)
    assert load_allocator().kept_bytes() == 0


def test_what_the_process_keeps_is_free_to_it_where_the_host_is_short(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "host_memory", lambda: (64 * MIB, 10 * MIB))
    mebibytes(8)
    assert device.read().free_bytes == 18 * MIB


def test_a_profiler_sees_kept_blocks_come_and_go(device: CpuDevice) -> None:
    mebibytes(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        tensor = mebibytes(8)
        del tensor
    changes = [event.cpu_memory_usage for event in profile.key_averages() if event.key == "aten::empty"]
    assert changes == [8 * MIB]


def test_memory_from_before_is_freed_without_being_charged(ledger_device: MakeDevice) -> None:
    before = mebibytes(8)
    device = ledger_device(64 * MIB)
    device.activate()
    during = mebibytes(4)
    del before
    assert device.meter().allocated_bytes() == 4 * MIB
    device.deactivate()
    outside = mebibytes(16)
    del during, outside
    assert device.read().used_bytes == 0


def test_what_was_charged_is_given_back_to_the_device_it_was_charged_to(ledger_device: MakeDevice) -> None:
    first, second = ledger_device(64 * MIB, "cpu-0"), ledger_device(64 * MIB, "cpu-1")
    first.activate()
    tensor = mebibytes(8)
    second.activate()
    other = mebibytes(4)
    assert (first.read().used_bytes, second.read().used_bytes) == (8 * MIB, 4 * MIB)
    del tensor, other
    assert (first.read().used_bytes, second.read().used_bytes) == (0, 0)


def test_tensors_outlive_the_device_they_were_charged_to(ledger_device: MakeDevice) -> None:
    device = ledger_device(64 * MIB)
    device.activate()
    tensor = torch.ones(MIB)
    device.deactivate()
    device.remove()
    assert tensor.sum() == MIB
    del tensor
    assert ledger_device(32 * MIB).read().free_bytes == 32 * MIB


def test_buffers_that_onednn_took_before_may_be_freed_after(ledger_device: MakeDevice) -> None:
    # oneDNN frees its buffers through the allocator that is current then.
    convolution = torch.nn.Conv2d(8, 8, 3)
    convolution(torch.randn(2, 8, 16, 16)).sum().backward()
    device = ledger_device(64 * MIB)
    device.activate()
    for size in range(8, 40):
        convolution(torch.randn(2, 8, size, size)).sum().backward()
    mkldnn = torch.randn(4, 8, 16, 16).to_mkldnn()
    assert torch.nn.functional.relu(mkldnn).to_dense().shape == (4, 8, 16, 16)
    del mkldnn
    convolution.zero_grad()
    gc.collect()
    assert device.read().used_bytes == 0


def test_the_profiler_still_sees_memory(device: CpuDevice) -> None:
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mebibytes(8)
    assert sum(event.self_cpu_memory_usage for event in profile.events()) == 0
    assert max(event.self_cpu_memory_usage for event in profile.events()) == 8 * MIB


def test_threads_lose_no_byte(device: CpuDevice) -> None:
    def work() -> None:
        for size in range(1, 400):
            first, second = mebibytes(size / 200), mebibytes(size / 400)
            del first
            second.add_(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.meter().allocated_bytes() == 0
    assert 0 < device.meter().peak_bytes() <= 64 * MIB


class Greedy(torch.autograd.Function):
    """The identity, whose backward takes 30 MiB for a moment."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        mebibytes(30)
        return grads[0]


def wait_for_an_interrupt() -> None:
    for _ in range(500):
        time.sleep(0.01)


class TestShortage:
    """The callback inside a failing allocation."""

    def test_it_is_told_what_is_missing_until_it_fits(self, device: CpuDevice) -> None:
        held = [mebibytes(10) for _ in range(6)]
        asked: list[int] = []

        def release(missing_bytes: int) -> int:
            asked.append(missing_bytes)
            return held.pop().nbytes

        assert device.on_shortage(release)
        assert mebibytes(20).nbytes == 20 * MIB
        assert asked == [16 * MIB, 6 * MIB]
        assert len(held) == 4

    def test_it_is_not_asked_while_memory_is_free(self, device: CpuDevice) -> None:
        asked: list[int] = []
        device.on_shortage(lambda missing_bytes: asked.append(missing_bytes) or 0)
        mebibytes(64)
        assert not asked

    @pytest.mark.parametrize("answer", [0, 2**40])
    def test_one_that_releases_nothing_is_not_asked_for_ever(self, device: CpuDevice, answer: int) -> None:
        asked: list[int] = []
        device.on_shortage(lambda missing_bytes: asked.append(missing_bytes) or answer)
        with pytest.raises(torch.OutOfMemoryError):
            mebibytes(65)
        assert asked == [1 * MIB]

    def test_one_that_fails_is_logged_and_the_allocation_fails(
        self, device: CpuDevice, caplog: pytest.LogCaptureFixture
    ) -> None:
        device.on_shortage(lambda missing_bytes: 1 // 0)
        with pytest.raises(torch.OutOfMemoryError):
            mebibytes(65)
        assert "ZeroDivisionError" in caplog.text

    def test_an_allocation_that_fails_inside_it_does_not_ask_again(self, device: CpuDevice) -> None:
        held = [mebibytes(60)]
        inside: list[str] = []

        def release(missing_bytes: int) -> int:
            try:
                mebibytes(10)
            except torch.OutOfMemoryError as error:
                inside.append(str(error))
            return held.pop().nbytes

        device.on_shortage(release)
        mebibytes(10)
        assert len(inside) == 1

    def test_it_works_within_a_backward(self, device: CpuDevice) -> None:
        held = [mebibytes(20) for _ in range(2)]
        device.on_shortage(lambda missing_bytes: held.pop().nbytes if held else 0)
        weight = torch.ones(MIB, requires_grad=True)
        loss = Greedy.apply(weight * 2).sum()
        assert len(held) == 2  # the forward fitted
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.eq(2).all()
        assert len(held) == 1

    def test_it_works_in_a_thread_that_python_has_never_seen(self, device: CpuDevice) -> None:
        held = [mebibytes(40)]
        device.on_shortage(lambda missing_bytes: held.pop().nbytes)
        allocator = load_allocator()
        libc = ctypes.CDLL(None)
        thread, address = ctypes.c_ulong(), ctypes.c_void_p()
        libc.pthread_create(ctypes.byref(thread), None, allocator.take, ctypes.c_void_p(30 * MIB))
        libc.pthread_join(thread, ctypes.byref(address))
        assert device.meter().allocated_bytes() == 30 * MIB
        assert address.value
        allocator.give_back(address.value)

    def test_another_thread_holds_the_interpreter_meanwhile(self, device: CpuDevice) -> None:
        held = [mebibytes(2) for _ in range(30)]
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                sum(range(1000))

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            device.on_shortage(lambda missing_bytes: held.pop().nbytes if held else 0)
            kept = [mebibytes(4) for _ in range(14)]
        finally:
            stop.set()
            thread.join()
        assert len(kept) == 14

    def test_none_takes_it_away(self, device: CpuDevice) -> None:
        asked: list[int] = []
        device.on_shortage(lambda missing_bytes: asked.append(missing_bytes) or 0)
        device.on_shortage(None)
        with pytest.raises(torch.OutOfMemoryError):
            mebibytes(65)
        assert not asked

    def test_an_interrupt_meanwhile_is_not_lost(self, device: CpuDevice) -> None:
        def interrupted(missing_bytes: int) -> int:
            raise KeyboardInterrupt

        device.on_shortage(interrupted)
        # A process that was started in the background of a script ignores the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                mebibytes(65)
            with pytest.raises(KeyboardInterrupt):
                wait_for_an_interrupt()
        finally:
            signal.signal(signal.SIGINT, before)


def test_a_meter_needs_an_active_device(ledger_device: MakeDevice) -> None:
    device = ledger_device(64 * MIB)
    assert not device.on_shortage(lambda missing_bytes: 0)
    with pytest.raises(DeviceError, match="activate"):
        device.meter()


def test_devices_are_opened_by_name_and_by_uuid(ledger_device: MakeDevice) -> None:
    made = ledger_device(64 * MIB, "cpu-3")
    assert open_device(name="cpu-3").uuid == open_device(uuid=made.uuid).uuid == made.uuid
    assert made.torch_device == torch.device("cpu")


def test_without_name_or_capacity_the_hosts_memory_is_the_device(devices_folder: object) -> None:
    device = open_device()
    assert device.name == "cpu-0"
    assert device.read().total_bytes > 64 * MIB
    assert open_device(kind="cpu").read().total_bytes == device.read().total_bytes

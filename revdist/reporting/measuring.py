"""Profiles and the memory of a real step, measured on this machine for `revdist plan`.

Nothing is trained. On a CPU, a private device as large as the host's memory is measured on, so that
every budget can be looked at whatever capacity the run's own devices have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import final

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from revdist.config import DeviceSpec, RunConfig
from revdist.devices import Device, list_devices, open_device
from revdist.devices.cpu import CpuDevice
from revdist.planning.costs import Mode, Profile
from revdist.reversible.chain import Event
from revdist.training.data import fetch
from revdist.training.optimizer import coming_state_bytes
from revdist.training.parts import Parts, build_parts
from revdist.training.profiling import Profiling, sizes_to_profile
from revdist.training.replicated import SummedLoss, move_batch


@final
class Bench:
    """The model and data of a run on one device of this machine, ready to be measured."""

    def __init__(self, config: RunConfig, device: Device, parts: Parts) -> None:
        self.config = config
        self.device = device
        self.parts = parts

    def profiles(self, console: Console, *, num_replicas: int) -> tuple[Profile, ...]:
        """Profiles at the micro-batch sizes the run would need, from the cache or measured under a progress bar."""
        profiling = Profiling(self.config, self.parts.model, self.parts.loss_fn, self.parts.train, self.device)
        sizes = sizes_to_profile(self.config, num_replicas)
        with _bar(console) as progress:
            task = progress.add_task(f"profiling on {self.device.name}", total=None)
            return profiling.profiles(sizes, lambda done, total: progress.update(task, completed=done, total=total))

    def fixed_bytes(self) -> int:
        """Bytes that no plan changes: parameters, buffers, gradients and the optimizer state to come."""
        model, trainable = self.parts.model, self.parts.trainable
        held = [*model.parameters(), *model.buffers(), *trainable]
        return sum(tensor.nbytes for tensor in held) + coming_state_bytes(self.config.optimizer, trainable)

    def timeline(self, modes: Sequence[Mode], micro_batch: int) -> tuple[list[int], int]:
        """Run one micro-batch under a schedule; returns its allocated bytes and their peak.

        The bytes are those of `replay`'s 2n moments: after each operator's forward, then at the start
        of each one's backward. Both leave out what is there between steps.
        """
        meter, chain = self.device.meter(), self.parts.chain
        loss = SummedLoss(self.parts.model, self.parts.loss_fn, self.config.precision)
        readings: dict[tuple[str, int], int] = {}

        def note(event: Event) -> None:
            readings[event.kind, event.operator] = meter.allocated_bytes()

        before = chain.schedule
        chain.set_schedule(modes)
        try:
            self._step(loss, micro_batch)  # gradients exist from here on, as in every step but the first
            between = meter.allocated_bytes()
            meter.reset_peak()
            chain.observe(note)
            self._step(loss, micro_batch)
            peak = meter.peak_bytes() - between
        finally:
            chain.observe(None)
            chain.set_schedule(before)
        count = len(modes)
        last = readings.get(("backward", count - 1), between)
        forward = [readings.get(("forward", number), last) for number in range(1, count)] + [last]
        backward = [readings.get(("backward", number), between) for number in reversed(range(count))]
        return [held - between for held in forward + backward], peak

    def _step(self, loss: SummedLoss, micro_batch: int) -> None:
        indices = np.arange(micro_batch) % len(self.parts.train)
        batch = move_batch(fetch(self.parts.train, indices), self.device.torch_device, self.config.precision)
        loss(batch).backward()


@contextmanager
def open_bench(config: RunConfig) -> Iterator[Bench]:
    """Build a run's model and data on a device of the kind it would use. Raises what `build_parts` raises."""
    torch.set_num_threads(config.threads_per_worker)
    spec = _spec(config)
    with _private_cpu() if spec.kind == "cpu" else nullcontext(open_device(kind="cuda", uuid=spec.uuid)) as device:
        device.activate("revdist plan")
        yield Bench(config, device, build_parts(config, device.torch_device))


@contextmanager
def _private_cpu() -> Iterator[Device]:
    """A CPU device as large as the host's memory that nobody else sees."""
    with tempfile.TemporaryDirectory(prefix="revdist-plan-") as folder:
        capacity_bytes = max(reading.total_bytes for reading in list_devices(directory=folder))
        device = CpuDevice.open("this-host", capacity_bytes=capacity_bytes, directory=folder)
        try:
            yield device
        finally:
            device.deactivate()


def _spec(config: RunConfig) -> DeviceSpec:
    """The device measured on: the run's first one, or a GPU of this machine where the run takes any."""
    if config.devices != "auto":
        return config.devices[0]
    gpus = [reading for reading in list_devices() if reading.kind == "cuda" and reading.usable]
    return DeviceSpec(kind="cuda", uuid=gpus[0].uuid) if gpus else DeviceSpec(kind="cpu")


def _bar(console: Console) -> Progress:
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

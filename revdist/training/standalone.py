"""`revdist.profile`: measure a model on the device its batch is on, outside of any run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from revdist.devices.allocator import load_allocator
from revdist.devices.cpu import CpuDevice, LedgerMeter
from revdist.devices.cuda import CudaMeter
from revdist.devices.device import MemoryMeter
from revdist.devices.host import host_memory
from revdist.errors import DeviceError, UsageError
from revdist.planning.costs import Mode, Profile
from revdist.reversible.profiler import Progress, profile_chain


def profile(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any], Tensor],
    *,
    repeats: int = 5,
    modes: Collection[Mode] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure the options of every operator of the model's chain, on the device of its batch.

    Runs `loss_fn(model(batch))` and its backward some tens of times, in the training mode the model is in;
    takes no optimizer step and leaves the model as it was. `loss_fn` returns a scalar; a tuple as batch is
    passed as several arguments. `modes` limits what is measured. On a CPU without an active device, this
    process's memory is counted on a device of its own for the time being.

    Raises UsageError where the model has no chain or the batch no tensor, and torch.OutOfMemoryError where
    not even the most frugal schedule fits.
    """
    first = next((part for part in (batch if isinstance(batch, tuple) else (batch,)) if isinstance(part, Tensor)), None)
    if first is None:
        raise UsageError(f"the batch must be a tensor or a tuple with one, not {type(batch).__name__}")
    with _meter(first.device) as meter:
        return profile_chain(model, batch, loss_fn, meter=meter, repeats=repeats, modes=modes, progress=progress)


@contextlib.contextmanager
def _meter(device: torch.device) -> Iterator[MemoryMeter]:
    """Counters of this process's memory on a torch device."""
    if device.type == "cuda":
        yield CudaMeter(torch.cuda.current_device() if device.index is None else device.index)
        return
    active = _active_allocator()
    if active is not None:
        yield active
        return
    scratch = CpuDevice.open(f"profile-{os.getpid()}", capacity_bytes=host_memory()[0])
    scratch.activate("revdist.profile")
    try:
        yield scratch.meter()
    finally:
        scratch.deactivate()
        scratch.remove()


def _active_allocator() -> MemoryMeter | None:
    """The meter of the CPU device that this process computes on, if it does on one."""
    try:
        allocator = load_allocator()
    except DeviceError:
        return None  # no compiler
    return LedgerMeter(allocator) if allocator.is_active() else None

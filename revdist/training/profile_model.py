"""`revdist.profile`: measure a model that this process holds, without a run."""

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
from revdist.reversible.profiler import profile_chain


def profile(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any], Tensor],
    *,
    repeats: int = 5,
    modes: Collection[Mode] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure every option of the model's chain on the device of its batch.

    `loss_fn` maps the model's output to a scalar. Runs some tens of forwards and backwards in the training
    mode the model is in, takes no optimizer step and leaves the model as it was. `modes` limits what
    is measured; `progress` is called with the steps done and their total.

    Raises UsageError where the model has no chain, and torch.OutOfMemoryError where no schedule fits.
    """
    first = next((part for part in (batch if isinstance(batch, tuple) else (batch,)) if isinstance(part, Tensor)), None)
    if first is None:
        raise UsageError(f"the batch must be a tensor or a tuple with one, not {type(batch).__name__}")
    with _meter_of(first.device) as meter:
        return profile_chain(model, batch, loss_fn, meter=meter, repeats=repeats, modes=modes, progress=progress)


@contextlib.contextmanager
def _meter_of(device: torch.device) -> Iterator[MemoryMeter]:
    if device.type == "cuda":
        yield CudaMeter(device.index if device.index is not None else torch.cuda.current_device())
        return
    with contextlib.suppress(DeviceError):
        allocator = load_allocator()
        if allocator.is_active():
            yield LedgerMeter(allocator)
            return
    own = CpuDevice.open(f"profile-{os.getpid()}", capacity_bytes=host_memory()[1])
    own.activate()
    try:
        yield own.meter()
    finally:
        own.deactivate()
        own.remove()

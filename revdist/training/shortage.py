"""When a device has no room for even the smallest plan: how much is missing."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from revdist.config import RunConfig
from revdist.devices.cpu import CpuDevice
from revdist.devices.device import Device
from revdist.devices.host import host_memory
from revdist.errors import BudgetTooSmall, OutOfDeviceMemory, UsageError, format_bytes
from revdist.training.data import fetch
from revdist.training.first_plan import thriftiest_modes
from revdist.training.optimizer import coming_state_bytes
from revdist.training.parts import Parts, build_parts
from revdist.training.replicated import SummedLoss, move_batch


def explain_shortage(
    config: RunConfig, device: Device, free_bytes: int, data: tuple[Any, Any] | None = None
) -> UsageError:
    """The error for a run that ran out of memory before it had a plan.

    free_bytes: what the device had free at the start
    data: as `build_parts` takes them

    On a CPU device the smallest plan is measured
    on a scratch device with all of the host's memory; this process computes on that one afterwards.
    """
    if not isinstance(device, CpuDevice) or not device.enforced:
        return OutOfDeviceMemory(
            f"{device.name} ({device.uuid}) has no room for the smallest plan; lower micro_batch, or free memory on it"
        )
    needed_bytes = _measure_smallest(config, data) + config.memory.margin
    if needed_bytes <= free_bytes:
        return OutOfDeviceMemory(
            f"{device.name} ran out of memory before it had a plan, though {format_bytes(free_bytes)} were free at the "
            f"start and the smallest plan needs {format_bytes(needed_bytes)}; lower micro_batch, or see who else uses "
            "it (revdist devices)",
            free_bytes=free_bytes,
            needed_bytes=needed_bytes,
        )
    return BudgetTooSmall(free_bytes, needed_bytes, where=device.name)


def _measure_smallest(config: RunConfig, data: tuple[Any, Any] | None) -> int:
    """Peak bytes of one micro-batch with everything rebuilt that can be, optimizer state included."""
    scratch = CpuDevice.open(f"scratch-{os.getpid()}", capacity_bytes=host_memory()[0])
    scratch.activate()
    try:
        parts = build_parts(config, scratch.torch_device, data)
        _run_smallest(config, parts)
        return scratch.meter().peak_bytes() + coming_state_bytes(config.optimizer, parts.trainable)
    finally:
        scratch.deactivate()
        scratch.remove()


def _run_smallest(config: RunConfig, parts: Parts) -> None:
    parts.chain.set_schedule(thriftiest_modes(parts.chain.options()))
    batch = fetch(parts.train, np.arange(config.micro_batch or 1) % len(parts.train))
    loss = SummedLoss(parts.model, parts.loss_fn, config.precision)
    with torch.enable_grad():
        loss(move_batch(batch, torch.device("cpu"), config.precision)).backward()

"""Everything that the steps of a replica work on, laid out so that no plan changes its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import torch

from revdist.config import RunConfig
from revdist.devices.device import Device
from revdist.planning.costs import Profile
from revdist.training.late_profile import LateProfile
from revdist.training.local_planner import LocalPlanner
from revdist.training.local_step import LocalStep
from revdist.training.memory import MemoryView
from revdist.training.optimizer import coming_state_bytes, state_bytes, step_peak_bytes
from revdist.training.parts import Parts
from revdist.training.replicated import Replicated


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Parts, their optimizer and the planner of one replica."""

    config: RunConfig
    device: Device
    parts: Parts
    replicated: Replicated
    local: LocalStep
    optimizer: torch.optim.Optimizer
    planner: LocalPlanner
    memory: MemoryView
    late_profile: LateProfile

    @classmethod
    def laid_out(
        cls,
        config: RunConfig,
        device: Device,
        parts: Parts,
        optimizer: torch.optim.Optimizer,
        *,
        resume: Callable[[], None],
        profiles: Sequence[Profile],
        late_profile: LateProfile,
        first_micro_batch: int,
    ) -> Self:
        """Gradients, buckets and optimizer state in place or counted, and a planner for what memory is left.

        resume: called once gradients are there: takes up an earlier state
        profiles: those that are known
        first_micro_batch: of the first steps, where none is
        """
        replicated = Replicated(parts.model, parts.loss_fn, config.precision)
        local = LocalStep(replicated, parts.chain, device, precision=config.precision, seed=config.seed)
        resume()
        meter = device.meter()
        between_bytes = max(step_peak_bytes(config.optimizer, parts.trainable, meter), replicated.rebuild_bytes)
        coming_bytes = coming_state_bytes(config.optimizer, parts.trainable) - state_bytes(optimizer)
        fixed_bytes = meter.allocated_bytes() + max(0, coming_bytes)
        planner = LocalPlanner(
            config,
            profiles,
            device=device.uuid,
            device_name=device.name,
            fixed_bytes=fixed_bytes,
            step_peak_bytes=between_bytes,
            options=parts.chain.options(),
            first_micro_batch=first_micro_batch,
        )
        parts.chain.never_inverted = planner.never_inverted
        return cls(
            config=config,
            device=device,
            parts=parts,
            replicated=replicated,
            local=local,
            optimizer=optimizer,
            planner=planner,
            memory=MemoryView(config, device, fixed_bytes=fixed_bytes),
            late_profile=late_profile,
        )

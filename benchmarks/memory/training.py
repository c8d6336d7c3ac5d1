"""Whole training steps: gradient buckets, forward, loss, backward and optimizer, predicted before the first one."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.memory.kernel import fresh_processes
from benchmarks.memory.networks import network
from revdist.config import OptimizerConfig
from revdist.devices import MemoryMeter, open_device
from revdist.planning.costs import Mode
from revdist.planning.frontier import solve
from revdist.reversible.chain import find_chain
from revdist.reversible.profiler import profile_chain
from revdist.training.optimizer import build_optimizer, coming_state_bytes, step_peak_bytes
from revdist.training.replicated import Replicated

CAPACITY_BYTES = 8 * 2**30
LOSS_BYTES = 8
STEPS = 4
SETTLED_S = 0.1
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD, momentum": {"factory": "torch.optim:SGD", "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}},
    "AdamW": {"factory": "torch.optim:AdamW", "kwargs": {"lr": 1e-3}},
}
TRAINED = ("revnet38", "reformer")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A training in one process with data parallelism, under the plan that lies midway."""

    network: str
    optimizer: str
    as_view: bool
    """Whether gradients lie in their buckets."""
    fixed_bytes: int
    """Parameters, gradients, buckets and the optimizer's state, which does not exist yet when it is predicted."""
    settled_bytes: int
    """What is really there after the last step."""
    predicted_bytes: int
    peaks_bytes: tuple[int, ...]
    """Per step, over forward, loss, backward and the optimizer."""
    predicted_step_peak_bytes: int
    """Temporaries of the optimizer."""
    step_peaks_bytes: tuple[int, ...]

    @property
    def error(self) -> float:
        return self.predicted_bytes / max(self.peaks_bytes) - 1


def whole_trainings() -> list[tuple[str, str, bool]]:
    return [(key, optimizer, as_view) for key in TRAINED for optimizer in OPTIMIZERS for as_view in (True, False)]


def train(key: str, optimizer: str, as_view: bool) -> Whole:
    """Some steps in a process of their own."""
    with fresh_processes().Pool(1) as pool:
        return pool.apply(_train, (key, optimizer, as_view))


def _train(key: str, optimizer_name: str, as_view: bool) -> Whole:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        device = open_device(name="training", capacity_bytes=CAPACITY_BYTES, directory=folder)
        device.activate()
        meter = device.meter()
        made = network(key).make()
        modes = (Mode.SAVE, Mode.INVERT, Mode.RECOMPUTE)
        profile = profile_chain(made.model, made.inputs, made.loss, meter=meter, repeats=1, modes=modes)
        frontier = solve(profile)
        plan = frontier.best((frontier.minimum_bytes + frontier.maximum_bytes) // 2)
        find_chain(made.model).set_schedule(plan.modes)

        config = OptimizerConfig(**OPTIMIZERS[optimizer_name])
        replicated = Replicated(made.model, made.loss_fn, "fp32", gradient_as_bucket_view=as_view)
        optimizer = build_optimizer(config, replicated.parameters)
        step_peak = step_peak_bytes(config, replicated.parameters, meter)
        batch_bytes = made.inputs.untyped_storage().nbytes()
        fixed = _settled_bytes(meter) - batch_bytes + coming_state_bytes(config, replicated.parameters)
        need = max(plan.need_bytes + LOSS_BYTES, step_peak + batch_bytes, replicated.rebuild_bytes + batch_bytes)
        peaks, step_peaks = [], []
        for _ in range(STEPS):
            replicated.start_step()
            meter.reset_peak()
            replicated.backward((made.inputs, made.target), 1 / len(made.inputs), reduce=True)
            compute_peak = meter.peak_bytes()
            meter.reset_peak()
            optimizer.step()
            peaks.append(max(compute_peak, meter.peak_bytes()))
            step_peaks.append(meter.peak_bytes() - meter.allocated_bytes())
        settled = _settled_bytes(meter) - batch_bytes
    return Whole(
        network=network(key).label,
        optimizer=optimizer_name,
        as_view=as_view,
        fixed_bytes=fixed,
        settled_bytes=settled,
        predicted_bytes=fixed + need,
        peaks_bytes=tuple(peaks),
        predicted_step_peak_bytes=step_peak,
        step_peaks_bytes=tuple(step_peaks),
    )


def _settled_bytes(meter: MemoryMeter) -> int:
    """What is allocated once gloo's own thread has let go of what it sent."""
    last, now = -1, meter.allocated_bytes()
    while now != last:
        time.sleep(SETTLED_S)
        last, now = now, meter.allocated_bytes()
    return now

"""Time and memory of one training step, every way of running the network taking turns.

One round runs one step of each; ratios are those of medians over the rounds. Time is the CPU time of
this process, so that other processes disturb it little. Peak is the most that the CPU allocator has
handed out during the step above what it had before it: activations, gradients, the batch and every
temporary, but not the parameters.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers.networks import Couplings, parameters, relative_error
from benchmarks.quartiles import quartiles
from revdist.devices import MemoryMeter

CHANNELS, SIZE, BATCH = 32, 32, 8
"""Channels of one half, pixels of a side, images in a batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to run the network, ready to step."""

    key: str
    label: str
    model: nn.Module
    network: Couplings
    schedule: Sequence[str] = ()
    """Modes that the model's chain is given before each step; empty: it has no chain."""
    budget_bytes: int | None = None
    """What the schedule was planned for, gradients included."""
    predicted_ratio: float | None = None
    """Step time over that of all-SAVE, as planned."""
    predicted_peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one case costs at one depth."""

    depth: int
    key: str
    label: str
    step_s: float
    """Median CPU time of a step."""
    time_ratio: float
    """Median over median of plain autograd."""
    time_ratio_low: float
    """Quartiles of the ratios within a round: how far the ratio can be trusted."""
    time_ratio_high: float
    peak_bytes: int
    peak_ratio: float
    gradient_bytes: int
    """Part of the peak that any way of training needs: gradients of all parameters."""
    gradient_error: float
    """Relative L2 difference of all gradients from those of plain autograd."""
    schedule: str = ""
    """One letter a half coupling."""
    budget_bytes: int | None = None
    predicted_ratio: float | None = None
    predicted_peak_bytes: int | None = None

    @property
    def activation_bytes(self) -> int:
        """The peak without the gradients of parameters."""
        return self.peak_bytes - self.gradient_bytes


@dataclasses.dataclass(slots=True)
class _Samples:
    times_s: list[float] = dataclasses.field(default_factory=list)
    peaks_bytes: list[int] = dataclasses.field(default_factory=list)
    gradients: list[Tensor] = dataclasses.field(default_factory=list)


def batch() -> Tensor:
    """One batch (B, 2C, H, W), the same at each call."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, 2 * CHANNELS, SIZE, SIZE, generator=generator)


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def measure(
    depth: int, cases: Sequence[Case], meter: MemoryMeter, *, rounds: int, done: Callable[[], None]
) -> list[Cost]:
    """Costs of all cases, the first of which is plain autograd. Calls `done` after each step."""
    samples = {case.key: _Samples() for case in cases}
    images = batch()
    draw = random.Random(0)
    for round_number in range(rounds + 1):
        for case in draw.sample(cases, len(cases)):  # nobody always runs after the same one
            _step(case, images, meter, samples[case.key], warm_up=round_number == 0)
            done()
    plain = samples[cases[0].key]
    return [_cost(depth, case, samples[case.key], plain) for case in cases]


def _step(case: Case, images: Tensor, meter: MemoryMeter, samples: _Samples, *, warm_up: bool) -> None:
    if case.schedule:
        case.model.set_schedule(case.schedule)  # type: ignore[operator]
    case.model.zero_grad(set_to_none=True)
    gc.collect()
    before_bytes = meter.allocated_bytes()
    meter.reset_peak()
    started_s = time.process_time()
    forward_and_backward(case.model, images)
    step_s = time.process_time() - started_s
    samples.peaks_bytes.append(meter.peak_bytes() - before_bytes)
    if warm_up:
        samples.gradients = [_gradient(parameter).clone() for parameter in parameters(case.network)]
    else:
        samples.times_s.append(step_s)


def forward_and_backward(model: nn.Module, images: Tensor) -> None:
    """One step without an optimizer. Each gets a batch of its own, for some destroy it, and may free it."""
    output = model(images.clone().requires_grad_())
    loss = loss_of(output)
    del output
    loss.backward()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _cost(depth: int, case: Case, samples: _Samples, plain: _Samples) -> Cost:
    step_s, plain_s = statistics.median(samples.times_s), statistics.median(plain.times_s)
    low, _, high = quartiles([own / other for own, other in zip(samples.times_s, plain.times_s, strict=True)])
    peak_bytes = max(samples.peaks_bytes)
    return Cost(
        depth=depth,
        key=case.key,
        label=case.label,
        step_s=step_s,
        time_ratio=step_s / plain_s,
        time_ratio_low=low,
        time_ratio_high=high,
        peak_bytes=peak_bytes,
        peak_ratio=peak_bytes / max(plain.peaks_bytes),
        gradient_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters(case.network)),
        gradient_error=relative_error(samples.gradients, plain.gradients),
        schedule="".join(mode[0] for mode in case.schedule),
        budget_bytes=case.budget_bytes,
        predicted_ratio=case.predicted_ratio,
        predicted_peak_bytes=case.predicted_peak_bytes,
    )

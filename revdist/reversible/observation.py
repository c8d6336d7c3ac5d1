"""One observed step: what each operator's forward and backward took, in bytes and in seconds."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revdist.planning.costs import Mode
from revdist.reversible.chain import Event, ReversibleChain
from revdist.reversible.engine import nothing_left_pending
from revdist.reversible.meter import MemoryMeter


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What one step runs."""

    model: nn.Module
    chain: ReversibleChain
    batch: Any
    """A tensor, or a tuple of arguments for the model."""
    loss_fn: Callable[[Any], Tensor]
    meter: MemoryMeter
    device: torch.device
    host_clock: Callable[[], float] = time.perf_counter
    """Seconds, for what runs on the host."""

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        arguments = self.batch if isinstance(self.batch, tuple) else (self.batch,)
        return self.loss_fn(self.model(*arguments))


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """One step under one schedule. Bytes count from what was allocated before the step."""

    modes: tuple[Mode, ...]
    outside_bytes: int
    """Allocated when the chain started its forward, its input included."""
    forward_peaks_bytes: tuple[int, ...]
    """Per operator: most bytes allocated while its forward ran."""
    backward_peaks_bytes: tuple[int, ...]
    """The same of its backward; of the last one also of what runs between the chain's forward and its backward."""
    seconds: tuple[float, ...]
    """Per operator: its forward and its backward. What ran outside the chain counts for the operator before it."""


def observe_step(work: Workload, modes: tuple[Mode, ...]) -> Observation:
    """Run one forward and backward under a schedule; takes no optimizer step.

    Raises torch.OutOfMemoryError where it does not fit, also where it only fitted because operators
    were demoted.
    """
    work.chain.set_schedule(modes)
    watch = _Watch(work)
    work.chain.observe(watch)
    hook = work.chain.register_forward_hook(watch.end_forward)
    demoted = work.chain.demoted_bytes
    try:
        with nothing_left_pending():
            torch.autograd.backward(work.forward())
    finally:
        hook.remove()
        work.chain.observe(None)
    watch.turn(None)
    if work.chain.demoted_bytes != demoted:
        raise torch.OutOfMemoryError("operators had to be demoted: the schedule does not fit")
    return watch.observation(modes)


class _Watch:
    """Reads the meter and the clock at every event."""

    def __init__(self, work: Workload) -> None:
        self._meter = work.meter
        self._clock = _CudaClock(work.device) if work.device.type == "cuda" else _HostClock(work.host_clock)
        self._forward_peaks = [0] * work.chain.num_operators
        self._backward_peaks = [0] * work.chain.num_operators
        self._peaks = self._forward_peaks
        self._turns: list[int] = []
        self._outside_bytes: int | None = None
        self._operator = 0
        self._meter.reset_peak()
        self._base_bytes = self._meter.allocated_bytes()
        self._clock.mark()

    def __call__(self, event: Event) -> None:
        self.turn(event.operator)

    def end_forward(self, *_: object) -> None:
        """The chain has run its forward."""
        self.turn(self._operator)
        self._peaks = self._backward_peaks

    def turn(self, operator: int | None) -> None:
        """The present turn is over; `operator` has the next one, None: the step has ended."""
        peak_bytes = self._meter.peak_bytes() - self._base_bytes
        self._peaks[self._operator] = max(self._peaks[self._operator], peak_bytes)
        if self._outside_bytes is None:
            self._outside_bytes = self._meter.allocated_bytes() - self._base_bytes
        self._turns.append(self._operator)
        if operator is not None:
            self._operator = operator
        self._meter.reset_peak()
        self._clock.mark()

    def observation(self, modes: tuple[Mode, ...]) -> Observation:
        seconds = [0.0] * len(modes)
        for operator, elapsed_s in zip(self._turns, self._clock.elapsed_s(), strict=True):
            seconds[operator] += elapsed_s
        assert self._outside_bytes is not None
        return Observation(
            modes,
            self._outside_bytes,
            tuple(self._forward_peaks),
            tuple(self._backward_peaks),
            tuple(seconds),
        )


class _HostClock:
    """Marks moments of a computation that runs on the host."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(self._clock())

    def elapsed_s(self) -> list[float]:
        """Seconds between each two marks."""
        return [after - before for before, after in itertools.pairwise(self._marks)]


class _CudaClock:
    """Marks moments of a computation that a GPU runs later than the host asks for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def elapsed_s(self) -> list[float]:
        """Seconds between each two marks."""
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(self._marks)]

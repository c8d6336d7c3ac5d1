"""Measures the options of every operator on this device: what the planner plans with.

Bytes come from the device's own allocator counters and seconds from its clock, so they hold for what
the model really does here. A mode is observed in steps in which every operator that offers it takes it
and the others hold as little as they can. Where that does not fit, it is observed a window of operators
at a time, down to single ones, so that profiling needs no more than the smallest plan and one operator.

The planner's working bytes of an operator are what its turns peaked at, over what the operators up to
it hold: the incoming gradient, rebuilt boundaries on their way from operator to operator and, for the
last operator, the loss are in them.

Not covered: the optimizer's step and state, and memory that a communication library takes.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revdist.planning.costs import Mode, Profile
from revdist.reversible.chain import find_chain
from revdist.reversible.derivation import Offered, derive_options, median_seconds
from revdist.reversible.held import Held, Occupied, measure_held, occupied_by
from revdist.reversible.meter import MemoryMeter
from revdist.reversible.observation import Observation, Workload, observe_step
from revdist.reversible.operator import Streams
from revdist.reversible.preserved import preserved
from revdist.reversible.reconstruction import Reconstruction, reconstructions

Progress = Callable[[int, int], None]
"""Called with the number of measured steps that are done, and their expected total."""

_FRUGAL = (Mode.INVERT, Mode.OFFLOAD, Mode.RECOMPUTE, Mode.SAVE)
"""The modes, what holds least first."""

_TURNS = 2
"""How often every schedule has its turn to be timed, so that a machine that slows down does so for all."""

Modes = tuple[Mode, ...]


def profile_chain(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any], Tensor],
    *,
    meter: MemoryMeter,
    repeats: int = 5,
    modes: Collection[Mode] | None = None,
    progress: Progress | None = None,
    host_clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure a model's chain on the device of its batch.

    Runs forwards and backwards of `loss_fn(model(batch))` (a tuple is passed as several arguments), in the
    training mode that the model is in. Takes no optimizer step and leaves the model as it was. `modes`
    limits what is measured; an operator that offers none of them is measured as it runs by default. Times
    are medians of `repeats` steps; on the host they are `host_clock`'s, so that time.process_time leaves out what
    other processes take.

    Raises torch.OutOfMemoryError where not even the most frugal schedule fits.
    """
    chain = find_chain(model)
    work = Workload(model, chain, batch, loss_fn, meter, _tensors(batch)[0].device, host_clock)
    offered = [_offered(available, modes) for available in chain.options()]
    with preserved(model, chain):
        gc.collect()
        return _Profiler(work, offered, max(1, repeats), progress).profile()


class _Profiler:
    """Runs the steps, and keeps what was observed."""

    def __init__(self, work: Workload, offered: Offered, repeats: int, progress: Progress | None) -> None:
        self._work = work
        self._offered = list(offered)
        self._repeats = repeats
        self._progress = progress
        self._frugal = tuple(next(mode for mode in _FRUGAL if mode in available) for available in offered)
        self._held: dict[int, Held] = {}
        self._observations: list[Observation] = []
        self._occupied: dict[Modes, Occupied] = {}
        self._num_done = 0
        self._num_expected = 8 + 4 * (repeats + _TURNS)

    def profile(self) -> Profile:
        self._observe(self._frugal)
        self._observations.clear()  # what libraries allocate once, and the time it takes, is no part of a step
        schedules = tuple(dict.fromkeys((self._frugal, *self._fitting_schedules())))
        num_turns = min(_TURNS, self._repeats)
        self._num_expected = self._num_done + (self._repeats + num_turns) * len(schedules) + 1
        timed: list[Observation] = []
        for turn in range(num_turns):
            for schedule in schedules:
                timed += self._time(schedule, len(range(turn, self._repeats, num_turns)))
        found = reconstructions(self._work.chain, self._chain_inputs())
        self._count(1)
        return self._derive(timed, found)

    def _fitting_schedules(self) -> Iterator[Modes]:
        """Schedules that together take every mode of every operator, each observed once."""
        everywhere = range(len(self._offered))
        for mode in Mode:
            if any(mode in available for available in self._offered):
                yield from self._in_windows(mode, everywhere)
        self._observe_mixtures()

    def _observe_mixtures(self) -> None:
        """What neighbours of different modes need, where it fits: each pattern of two modes, along the chain."""
        everywhere = range(len(self._offered))
        uniform = {mode: self._taking(mode, everywhere) for mode in Mode}
        mixtures = dict.fromkeys(
            tuple(uniform[pattern[(index + shift) % len(pattern)]][index] for index in everywhere)
            for pattern in _patterns(self._offered)
            for shift in range(len(pattern))
        )
        for mixture in [mixture for mixture in mixtures if mixture not in uniform.values()]:
            with contextlib.suppress(torch.OutOfMemoryError):
                self._observe(mixture)

    def _in_windows(self, mode: Mode, window: range) -> Iterator[Modes]:
        """Schedules with `mode` in this window, or in its halves where it does not fit.

        Halves overlap by one operator, so that what neighbours share is seen.
        """
        schedule = self._taking(mode, window)
        try:
            self._observe(schedule)
            self._hold(schedule, window)
        except torch.OutOfMemoryError:
            if schedule == self._frugal:
                raise
        else:
            yield schedule
            return
        if len(window) == 1:
            self._withdraw(mode, window.start)
            return
        middle = (window.start + window.stop) // 2
        overlap = 1 if len(window) > 2 else 0
        yield from self._in_windows(mode, range(window.start, middle + overlap))
        yield from self._in_windows(mode, range(middle, window.stop))

    def _taking(self, mode: Mode, window: range) -> Modes:
        return tuple(
            mode if index in window and mode in available else self._frugal[index]
            for index, available in enumerate(self._offered)
        )

    def _withdraw(self, mode: Mode, operator: int) -> None:
        """The device has no room for this mode: the planner is not to know of it."""
        self._offered[operator] = tuple(other for other in self._offered[operator] if other is not mode)

    def _hold(self, schedule: Modes, window: range) -> None:
        """Measure what the operators of a window hold, where this schedule shows more of it than is known."""
        shown = [index for index in window if schedule[index] is _most_holding(self._offered[index])]
        if all(index in self._held for index in shown):
            return
        measured = measure_held(self._work, schedule, window)
        self._count(2)
        for index in shown:
            held = measured[index - window.start]
            if index != window.start:  # the first of a window does not know what it shares
                self._held[index] = held
            else:
                self._held.setdefault(index, held)

    def _time(self, schedule: Modes, num_steps: int) -> list[Observation]:
        """Steps in a row, as in training; one before them brings back the memory that another schedule let go."""
        for _ in range(1 + num_steps):
            self._observe(schedule)
        return self._observations[-num_steps:]

    def _observe(self, schedule: Modes) -> None:
        self._observations.append(observe_step(self._work, schedule))
        if schedule not in self._occupied:  # after a step: the first forward of an operator that saves is another
            self._occupied[schedule] = occupied_by(self._work, schedule)
        self._count(1)

    def _count(self, num_steps: int) -> None:
        self._num_done += num_steps
        if self._progress is not None:
            self._progress(self._num_done, max(self._num_done, self._num_expected))

    def _chain_inputs(self) -> Streams:
        captured: list[Streams] = []

        def capture(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            (inputs,) = arguments
            captured.append((inputs,) if isinstance(inputs, Tensor) else tuple(inputs))

        hook = self._work.chain.register_forward_pre_hook(capture)
        try:
            with torch.no_grad():
                self._work.forward()
        finally:
            hook.remove()
        return captured[0]

    def _derive(self, timed: Sequence[Observation], found: Sequence[Reconstruction]) -> Profile:
        chain, model = self._work.chain, self._work.model
        batch = _tensors(self._work.batch)
        outside_bytes = max(observation.outside_bytes for observation in self._observations)
        seconds = median_seconds(timed)
        held = [self._held[index] for index in range(len(self._offered))]
        return Profile(
            options=derive_options(self._offered, held, self._observations, self._occupied, seconds, outside_bytes),
            operator_names=chain.operator_names,
            micro_batch=batch[0].shape[0],
            base_s=sum(
                min(seconds[index, mode] for mode in available) for index, available in enumerate(self._offered)
            ),
            outside_bytes=outside_bytes + _storage_bytes(batch),
            fixed_bytes=_storage_bytes(
                [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
            ),
            reconstruction_error=tuple(one.error for one in found),
            error_growth=tuple(one.growth for one in found),
        )


def _patterns(offered: Offered) -> Iterator[Modes]:
    """Two modes in turn; where operators are inverted as a whole, also two by two and in runs of INVERT.

    What comes behind such a run is felt further up: an inverse may need more than the forward. A half of a
    coupling needs what its branch does in either direction.
    """
    for one, other in itertools.combinations(Mode, 2):
        yield one, other
    if not any(Mode.INVERT in modes and Mode.RECOMPUTE in modes for modes in offered):
        return
    for one, other in itertools.combinations([mode for mode in Mode if mode is not Mode.INVERT], 2):
        yield one, one, other, other
    for other in Mode:
        if other is not Mode.INVERT:
            yield Mode.INVERT, Mode.INVERT, other
            yield Mode.INVERT, Mode.INVERT, Mode.INVERT, other


def _offered(available: Modes, wanted: Collection[Mode] | None) -> Modes:
    """The modes to measure, in the order of `Mode`."""
    return tuple(mode for mode in Mode if mode in available and (wanted is None or mode in wanted)) or available[:1]


def _most_holding(available: Modes) -> Mode:
    """The mode under which everything can be seen that another of these modes holds."""
    return next(mode for mode in reversed(_FRUGAL) if mode in available)


def _tensors(batch: Any) -> list[Tensor]:
    return [part for part in (batch if isinstance(batch, tuple) else (batch,)) if isinstance(part, Tensor)]


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

"""What each operator holds between its forward and its backward, from the allocator's counters.

After a forward in which a run of operators saves, their records are emptied one by one. Emptied from the last
to the first, each frees what it does not share with the one before it; from the first to the last, what
it does not share with the one after it. With S_i what operator i holds and o_i = |S_i and S_{i-1}| in
common, the first gives |S_i| - o_i and the second |S_i| - o_{i+1}, so that |S_i| and o_i follow from
o = 0 at the first operator of the run. Two forwards measure them all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import torch

from revdist.planning.costs import Mode
from revdist.reversible.observation import Workload
from revdist.reversible.record import Part


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """What one operator holds at the start of the backward, in bytes."""

    internals_bytes: int
    """What SAVE holds on top of the input."""
    input_bytes: int
    """The operator's input, where nothing outside the chain holds it anyway."""
    notes_bytes: int
    """What every mode holds that may run again: notes and batch statistics of the forward, buffers from before it."""
    shared_bytes: int
    """What of the input the operator before holds too when it saves."""
    passed_bytes: int
    """What of the input the operator after holds too when it saves."""


def measure_held(work: Workload, modes: tuple[Mode, ...], window: range) -> list[Held]:
    """What the operators of a window hold, all of which save under `modes`.

    The first operator of the window counts as sharing nothing. Raises torch.OutOfMemoryError where the
    forward does not fit.
    """
    work.chain.set_schedule(modes)
    unshared_before = _free_one_by_one(work, reversed(window))
    unshared_after = _free_one_by_one(work, window)
    held = []
    shared = 0
    for operator in window:
        before, after = unshared_before[operator], unshared_after[operator]
        input_bytes = before["boundary"] + shared
        passed = max(0, input_bytes - after["boundary"])
        held.append(Held(before["internals"], input_bytes, before["notes"], shared, passed))
        shared = max(0, before["internals"] + input_bytes - after["internals"] - after["boundary"])
    return held


@dataclasses.dataclass(frozen=True, slots=True)
class Occupied:
    """What each operator and those before it hold under one schedule, in bytes, each storage counted once."""

    forward_bytes: tuple[int, ...]
    """Over the chain's input, which its caller holds until the chain's forward has ended."""
    backward_bytes: tuple[int, ...]
    """The input included, where nothing outside the chain holds it."""


def occupied_by(work: Workload, modes: tuple[Mode, ...]) -> Occupied:
    """What the operators hold. Raises torch.OutOfMemoryError where the forward does not fit."""
    work.chain.set_schedule(modes)
    operators = range(len(modes))
    inputs: list[object] = []
    hook = work.chain.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments))
    try:
        without = _free_one_by_one(work, reversed(operators))
    finally:
        hook.remove()
    before = work.meter.allocated_bytes()
    inputs.clear()
    is_held_outside = work.meter.allocated_bytes() == before
    freed = without if is_held_outside else _free_one_by_one(work, reversed(operators))
    return Occupied(_sums(without), _sums(freed))


def _sums(freed: Mapping[int, Mapping[Part, int]]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(sum(freed[index].values()) for index in range(len(freed))))


def _free_one_by_one(work: Workload, order: Iterable[int]) -> dict[int, dict[Part, int]]:
    """Per operator, the bytes that its record frees, part by part, when emptied in this order."""
    demoted = work.chain.demoted_bytes
    loss = work.forward()
    records = {record.operator: record for record in work.chain.live_records()}
    operators = work.chain.operators
    freed: dict[int, dict[Part, int]] = {}
    for index in order:
        record = records.get(operators[index])
        freed[index] = dict.fromkeys(("internals", "boundary", "notes"), 0)
        for part in freed[index]:
            before = work.meter.allocated_bytes()
            if record is not None:
                record.release(part)
            freed[index][part] = before - work.meter.allocated_bytes()
    del loss
    if work.chain.demoted_bytes != demoted:
        raise torch.OutOfMemoryError("operators had to be demoted: the schedule does not fit")
    return freed

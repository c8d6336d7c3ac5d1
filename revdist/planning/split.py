"""Shares of the global batch: integers that sum to it and make the slowest replica as fast as can be.

A threshold T lets replica i take the most samples whose step takes at most T. The least T under
which all replicas together take the whole batch is the best possible slowest step: it is found
exactly, by bisection over floating-point numbers in their order. Each replica's share lies between
what it takes under the lower and under the upper end, so that the search for it narrows along.

Every replica gets one sample at least, however slow it is, since a replica without gradients cannot
take part in the reduction; the others are then as fast as they can be among themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from revdist.errors import BatchTooSmall, UsageError
from revdist.planning.batch import StepTimeCurve

if TYPE_CHECKING:
    from revdist.planning.kernels import Ints


def split(curves: Sequence[StepTimeCurve], global_batch: int) -> tuple[int, ...]:
    """Shares in the order of `curves`; where several are equally good, earlier replicas get more.

    Raises BatchTooSmall where the batch gives some replica no sample, UsageError where the curves do
    not cover it.
    """
    _check(global_batch, len(curves))
    unique, inverse = _deduplicate(curves)
    counts = np.bincount(inverse)
    low = np.ones(len(unique), np.int64)
    high = np.array([curve.max_share for curve in unique], np.int64)
    most = int(counts @ high)
    if most < global_batch:
        raise UsageError(
            f"global_batch is {global_batch} but the devices take {most} samples together, "
            f"{global_batch - most} missing: lower global_batch or add devices",
            missing_samples=global_batch - most,
        )
    _narrow(unique, counts, low, high, global_batch)
    shares, room = low[inverse], (high - low)[inverse]
    left = global_batch - int(shares.sum())
    before = np.cumsum(room) - room
    return tuple((shares + np.clip(left - before, 0, room)).tolist())


def equal_split(global_batch: int, num_replicas: int) -> tuple[int, ...]:
    """Shares that differ by one at most, larger ones first; raises BatchTooSmall below one each."""
    _check(global_batch, num_replicas)
    smaller, larger_ones = divmod(global_batch, num_replicas)
    return (smaller + 1,) * larger_ones + (smaller,) * (num_replicas - larger_ones)


def slowest_s(curves: Sequence[StepTimeCurve], shares: Sequence[int]) -> float:
    """Seconds of the slowest replica's step."""
    return max(curve.step_s(share) for curve, share in zip(curves, shares, strict=True))


def _check(global_batch: int, num_replicas: int) -> None:
    if num_replicas < 1:
        raise UsageError("no replicas to split the batch over: give at least one")
    if global_batch < num_replicas:
        raise BatchTooSmall(
            f"global_batch is {global_batch} for {num_replicas} replicas: raise it to {num_replicas} at least, "
            f"or use fewer replicas, {max(global_batch, 1)} at most"
        )


def _deduplicate(curves: Sequence[StepTimeCurve]) -> tuple[list[StepTimeCurve], Ints]:
    """The distinct curve objects, and for each replica which one is its own."""
    position: dict[int, int] = {}
    unique: list[StepTimeCurve] = []
    inverse = np.empty(len(curves), np.int64)
    for index, curve in enumerate(curves):
        place = position.setdefault(id(curve), len(unique))
        if place == len(unique):
            unique.append(curve)
        inverse[index] = place
    return unique, inverse


def _narrow(unique: list[StepTimeCurve], counts: Ints, low: Ints, high: Ints, global_batch: int) -> None:
    """Move low and high, in place, to the shares under adjacent thresholds around the best one.

    Under the lower threshold the replicas take less than the batch, or one sample each; under the
    upper one they take the whole batch or more.
    """
    from revdist.planning import kernels  # compiled code, which equal shares do without

    cuts = [cut for curve in unique for cut in curve.cuts]
    lengths = np.array([len(curve.cuts) for curve in unique], np.int64)
    micro_batch = np.array([cut.micro_batch for cut in cuts], np.int64)
    micro_batch_s = np.array([cut.micro_batch_s for cut in cuts], np.float64)
    sample_s = np.array([cut.sample_s for cut in cuts], np.float64)
    overhead_s = np.array([curve.overhead_s for curve in unique], np.float64)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    longest = np.repeat(high, lengths)
    longest_s = -(-longest // micro_batch) * micro_batch_s + sample_s * longest + np.repeat(overhead_s, lengths)
    below, above = -1, _order(float(longest_s.max()) * 2)
    while above - below > 1:
        middle = (below + above) // 2
        taken = kernels.shares_within(
            _number(middle), starts, micro_batch, micro_batch_s, sample_s, overhead_s, low, high
        )
        if int(counts @ taken) >= global_batch:
            above, high[:] = middle, taken
        else:
            below, low[:] = middle, taken


def _order(number: float) -> int:
    """Rank of a float that is not negative among all such floats."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _number(order: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", order))[0])

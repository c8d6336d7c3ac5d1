"""From readings to decisions: keep the plan, adopt another, or stop. Pure: time is passed in.

Memory that is lost is met at once. Memory that is gained is used only after it stayed free for a
while, and only as much as was free throughout: a co-tenant that comes and goes then costs one
replan, not one a reading. Shares change only when measured steps leave little doubt that new ones are faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from revdist.errors import InvalidCosts, format_bytes
from revdist.planning.batch import StepTimeCurve
from revdist.planning.split import split

_BLOCKS = 8
"""Stretches of consecutive steps whose means are compared: neighbouring steps are slow or fast together."""
_STANDARD_ERRORS = 3.0
"""By how many a gain must exceed the least one."""


def budget_of(
    free_bytes: int,
    reserved_bytes: int,
    allocated_bytes: int,
    *,
    margin_bytes: int = 0,
    fragmentation: float = 0.0,
    activation_bytes: int = 0,
    pending_bytes: int = 0,
    limit_bytes: int | None = None,
) -> int:
    """Bytes that activations may use on a device.

    free_bytes: what the device reports free. reserved_bytes, allocated_bytes: what this process's
    allocator has taken from the device, and what of it is in tensors; the rest can be used again.
    activation_bytes: what of allocated_bytes is activations, hence counted as free.
    pending_bytes: what is fixed during a step and not allocated yet, such as optimizer state before
    the first step, gradients and communication buckets. fragmentation: share of what may still be
    taken that is written off. limit_bytes: upper limit of the answer.

    Rounds down; 0 where nothing is left.
    """
    if not 0 <= fragmentation < 1:
        raise InvalidCosts(f"fragmentation is {fragmentation}: it must be at least 0 and below 1")
    available = free_bytes + reserved_bytes - allocated_bytes
    usable = available - math.ceil(max(available, 0) * fragmentation)
    budget = usable + activation_bytes - pending_bytes - margin_bytes
    return max(0, budget if limit_bytes is None else min(budget, limit_bytes))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How readily plans change."""

    min_change: float = 0.05
    """Relative gain of budget below which the plan is kept."""
    settle_s: float = 1.0
    """Seconds for which gained memory must stay free before it is used."""
    patience_s: float = 0.0
    """Seconds for which the device may be too small for any plan before the replica stops."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The plan in force, as far as memory is concerned, and what has been seen since."""

    budget_bytes: int
    """Budget that the plan was made for."""
    need_bytes: int
    """Most activation bytes the plan needs."""
    minimum_bytes: int
    """Least budget for which this device has any plan: the smallest need at a micro-batch of one."""
    gained_since_s: float | None = None
    """When more memory than the plan was made for has been free without a break; None: it is not."""
    gained_bytes: int = 0
    """The least budget since then."""
    short_since_s: float | None = None
    """Since when not even `minimum_bytes` have been there; None: they are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Keep:
    """Go on with the plan in force."""

    standing: Standing
    """To be passed to the next decision."""


@dataclasses.dataclass(frozen=True, slots=True)
class Replan:
    """Adopt the best plan for `budget_bytes`."""

    budget_bytes: int
    reason: str
    """memory-lost or memory-gained, as in `Plan.reason`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """No plan fits any more."""

    missing_bytes: int
    reason: str


Decision = Keep | Replan | Stop


def decide(standing: Standing, budget_bytes: int, now_s: float, rules: Rules) -> Decision:
    """What a new budget means for the plan in force."""
    if budget_bytes < standing.minimum_bytes:
        return _short(standing, budget_bytes, now_s, rules)
    if budget_bytes < standing.need_bytes:
        return Replan(budget_bytes, "memory-lost")
    standing = dataclasses.replace(standing, short_since_s=None)
    if budget_bytes <= standing.budget_bytes * (1 + rules.min_change):
        # Within the old budget the plan still fits, so it still is the best one.
        return Keep(dataclasses.replace(standing, gained_since_s=None, gained_bytes=0))
    if standing.gained_since_s is None:
        standing = dataclasses.replace(standing, gained_since_s=now_s, gained_bytes=budget_bytes)
    else:
        standing = dataclasses.replace(standing, gained_bytes=min(standing.gained_bytes, budget_bytes))
    assert standing.gained_since_s is not None
    if now_s - standing.gained_since_s >= rules.settle_s:
        return Replan(standing.gained_bytes, "memory-gained")
    return Keep(standing)


def _short(standing: Standing, budget_bytes: int, now_s: float, rules: Rules) -> Decision:
    since_s = now_s if standing.short_since_s is None else standing.short_since_s
    if now_s - since_s >= rules.patience_s:
        missing = standing.minimum_bytes - budget_bytes
        return Stop(
            missing,
            f"{format_bytes(budget_bytes)} are left for activations and the smallest plan needs "
            f"{format_bytes(standing.minimum_bytes)}: free {format_bytes(missing)} on the device",
        )
    if standing.need_bytes > standing.minimum_bytes:
        return Replan(standing.minimum_bytes, "memory-lost")
    return Keep(dataclasses.replace(standing, gained_since_s=None, gained_bytes=0, short_since_s=since_s))


@dataclasses.dataclass(frozen=True, slots=True)
class Resplit:
    """Adopt new shares."""

    shares: tuple[int, ...]
    gain: float
    """Part of a step's time that the new shares would have saved, the mean over the measured steps."""
    factors: tuple[float, ...]
    """Per replica: measured over predicted time; its curve is to be scaled by it."""


def resplit(
    curves: Sequence[StepTimeCurve],
    shares: Sequence[int],
    measured_s: npt.ArrayLike,
    *,
    min_gain: float = 0.05,
) -> Resplit | None:
    """New shares where measured steps leave little doubt that they are faster; None: keep.

    curves: the current ones. measured_s (steps, replicas): seconds of each replica's own work under these shares,
    without waiting for others, oldest first, at least eight steps. Every step tells what it would have taken under the
    new shares, each replica as much faster or slower as its curve says. Steps are taken together in eight stretches;
    the mean of what these would have saved, less three times its standard error, must reach `min_gain`.
    Steps that are noisy, or few, thus change nothing that is not far off, and steady ones soon change what is
    slightly off.
    """
    times = np.asarray(measured_s, np.float64)
    now_s = np.array([curve.step_s(share) for curve, share in zip(curves, shares, strict=True)])
    usual_s = _middle_mean(times)
    if len(times) < _BLOCKS or not now_s.all() or not usual_s.all():
        return None
    factors = tuple((usual_s / now_s).tolist())
    proposed = split([curve.scaled(factor) for curve, factor in zip(curves, factors, strict=True)], sum(shares))
    if proposed == tuple(shares):
        return None
    ratios = np.array([curve.step_s(share) for curve, share in zip(curves, proposed, strict=True)]) / now_s
    saved = 1 - (times * ratios).max(axis=1) / times.max(axis=1)
    gains = np.array([block.mean() for block in np.array_split(saved, _BLOCKS)])
    gain = float(gains.mean())
    doubt = _STANDARD_ERRORS * float(gains.std(ddof=1)) / math.sqrt(_BLOCKS)
    return Resplit(proposed, gain, factors) if gain - doubt >= min_gain else None


def _middle_mean(times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Per replica, the mean of its steps without the fastest and the slowest quarter."""
    quarter = len(times) // 4
    mean: npt.NDArray[np.float64] = np.sort(times, axis=0)[quarter : len(times) - quarter].mean(axis=0)
    return mean

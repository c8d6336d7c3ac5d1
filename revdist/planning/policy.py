"""From readings to decisions: keep the plan, adopt another, or stop. Pure: time is passed in.

Memory that is lost is met at once. Memory that is gained is used only after it stayed free for a
while, and only as much as was free throughout: a co-tenant that comes and goes then costs one
replan, not one a reading. Shares change only when measured times say so in both halves of a window.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from revdist.errors import InvalidCosts, format_bytes
from revdist.planning.batch import StepTimeCurve
from revdist.planning.split import slowest_s, split


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
    """Part of the slowest replica's step time that the new shares are expected to save."""
    factors: tuple[float, ...]
    """Per replica: measured over predicted time; its curve is to be scaled by it."""


def resplit(
    curves: Sequence[StepTimeCurve],
    shares: Sequence[int],
    measured_s: Sequence[Sequence[float]],
    *,
    min_gain: float = 0.05,
    window: int = 8,
) -> Resplit | None:
    """New shares where measured step times have called for them throughout a window; None: keep.

    curves: the current ones. measured_s: per replica, seconds of its own work in its latest steps
    under these shares, oldest first, without waiting for others. Both halves of the last `window`
    steps must agree that the new shares save `min_gain`: one slow step is noise.
    """
    if min(len(times) for times in measured_s) < window:
        return None
    recent = [times[-window:] for times in measured_s]
    factors = _factors(curves, shares, recent)
    proposed = split([curve.scaled(factor) for curve, factor in zip(curves, factors, strict=True)], sum(shares))
    halves = [[times[: window // 2] for times in recent], [times[window // 2 :] for times in recent]]
    gains = []
    for half in halves:
        corrected = [curve.scaled(factor) for curve, factor in zip(curves, _factors(curves, shares, half), strict=True)]
        gains.append(1 - slowest_s(corrected, proposed) / slowest_s(corrected, shares))
    gain = min(gains)
    return Resplit(proposed, gain, tuple(factors)) if proposed != tuple(shares) and gain >= min_gain else None


def _factors(
    curves: Sequence[StepTimeCurve], shares: Sequence[int], measured_s: Sequence[Sequence[float]]
) -> list[float]:
    return [
        statistics.median(times) / curve.step_s(share) if curve.step_s(share) > 0 else 1.0
        for curve, share, times in zip(curves, shares, measured_s, strict=True)
    ]

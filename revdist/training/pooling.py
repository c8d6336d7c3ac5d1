"""Making one consistent set of profiles out of what several ranks and micro-batch sizes measured.

Devices of one type are measured once each, and every measurement has its noise. Pooled, they start
alike; a device that really is slower shows in its measured steps, which move the shares.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from revdist.planning.costs import Before, Mode, Option, Profile

Operator = tuple[Option, ...]


def pooled(own: Sequence[Profile], everyone: Sequence[Profile]) -> tuple[Profile, ...]:
    """Own profiles, each with the medians of all that were measured under its key.

    The result is the same on every rank that has the same key: bytes are the largest, so that a plan
    fits on each of them.
    """
    return tuple(_pool(profile, [other for other in everyone if other.key == profile.key]) for profile in own)


def aligned(profiles: Sequence[Profile]) -> tuple[Profile, ...]:
    """Profiles at several micro-batch sizes, with the options that all of them have.

    A size may lack a mode for which the device had no room. Whether an operator holds its output is
    the same at every size, or else is not relied upon.
    """
    per_operator = [_common(choices) for choices in zip(*(profile.options for profile in profiles), strict=True)]
    return tuple(
        dataclasses.replace(profile, options=tuple(operators[number] for operators in per_operator))
        for number, profile in enumerate(profiles)
    )


def _pool(own: Profile, same: Sequence[Profile]) -> Profile:
    if len(same) < 2:
        return own
    operators = zip(*(profile.options for profile in same), strict=True)
    return dataclasses.replace(
        own,
        options=tuple(_pool_operator(mine, others) for mine, others in zip(own.options, operators, strict=True)),
        base_s=statistics.median(profile.base_s for profile in same),
        outside_bytes=max(profile.outside_bytes for profile in same),
    )


def _pool_operator(own: Operator, measured: Sequence[Operator]) -> Operator:
    return tuple(
        _pool_option(option, [other for options in measured for other in options if other.mode is option.mode])
        for option in own
    )


def _pool_option(own: Option, measured: Sequence[Option]) -> Option:
    held = max(option.held_bytes for option in measured)
    unshared = max(option.held_bytes - option.shared_bytes for option in measured)
    working = {before: max(option.working_by_before[before] for option in measured) for before in Before}
    return dataclasses.replace(
        own,
        held_bytes=held,
        extra_s=statistics.median(option.extra_s for option in measured),
        shared_bytes=held - unshared,
        holds_output=all(option.holds_output for option in measured),
    ).needing(working)


def _common(sizes: Sequence[Operator]) -> tuple[Operator, ...]:
    """Per size: the options of one operator whose mode every size offers."""
    modes = [mode for mode in Mode if all(any(option.mode is mode for option in options) for options in sizes)]
    if not modes:
        return tuple(sizes)
    holds = {mode: all(o.holds_output for options in sizes for o in options if o.mode is mode) for mode in modes}
    return tuple(
        tuple(dataclasses.replace(o, holds_output=holds[o.mode]) for o in options if o.mode in modes)
        for options in sizes
    )

"""A profile as arrays: what the dynamic program reads, with times counted in ticks.

Seconds become integers, so that sums are exact whatever their order: with floats, equal sums in
another order differ in the last bit, and each such pair would stay in the frontier as two points.
A tick is the power of two that puts the largest possible sum just below 2**50 ticks. An optimum is
therefore the optimum to within n * 2**-51 of that sum, about what a float sum would lose.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from revdist.errors import InvalidCosts
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.kernels import Ints

Flags = npt.NDArray[np.bool_]

TICK_BITS = 50
MAX_OPTIONS = len(Mode)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Options of n operators, padded to four; state 1 means that the operator before holds its output."""

    modes: tuple[tuple[Mode, ...], ...]
    """Per operator: the modes its options stand for."""
    held: Ints
    """(2, n, 4) bytes held, by the state in which the operator is reached."""
    working: Ints
    """(n, 4) bytes on top."""
    ticks: Ints
    """(n, 4) extra time in ticks."""
    extra_s: npt.NDArray[np.float64]
    """(n, 4) extra time in seconds, as given."""
    leads_to: Ints
    """(n, 4) the state in which the next operator is reached."""
    reference: float
    """Ticks that guarantees count from: `base_s`, or the slowest schedule's extra time where that is more."""
    num_options: Ints
    """(n,) options of each operator."""
    two_lists: Flags
    """(n,) whether both states occur and cost differently; else both rows of `held` are of the one that occurs."""

    @property
    def num_operators(self) -> int:
        return len(self.modes)


def arrange(profile: Profile, modes: Collection[Mode] | None = None) -> Stages:
    """Arrays for `profile`, restricted to `modes` where given.

    Raises InvalidCosts for a mode listed twice or unknown and for an operator left without one.
    """
    operators = profile.options if modes is None else _restrict(profile, modes)
    slowest_s = sum(max(option.extra_s for option in options) for options in operators)
    shift = TICK_BITS - math.frexp(slowest_s)[1]
    numbers: list[int] = []
    seconds: list[float] = []
    for options in operators:
        for o in options:
            numbers += (o.held_bytes, o.held_bytes - o.shared_bytes, o.working_bytes, o.holds_output)
            seconds.append(o.extra_s)
        padding = MAX_OPTIONS - len(options)
        numbers += (0, 0, 0, 0) * padding
        seconds += (0.0,) * padding
    held, own, working, holds = np.array(numbers, np.int64).reshape(-1, MAX_OPTIONS, 4).transpose(2, 0, 1)
    extra_s = np.array(seconds).reshape(-1, MAX_OPTIONS)
    num_options = np.array([len(options) for options in operators])
    occurs = _occurring(holds.sum(axis=1), num_options)
    states = np.stack([np.where(occurs[0, :, None], held, own), np.where(occurs[1, :, None], own, held)])
    return Stages(
        modes=tuple(tuple(option.mode for option in options) for options in operators),
        held=states,
        working=np.ascontiguousarray(working),
        ticks=np.rint(np.ldexp(extra_s, shift)).astype(np.int64),
        extra_s=extra_s,
        leads_to=np.ascontiguousarray(holds),
        reference=_scaled(max(profile.base_s, slowest_s), shift),
        num_options=num_options,
        two_lists=(states[0] != states[1]).any(axis=1),
    )


def _occurring(num_holding: Ints, num_options: Ints) -> Flags:
    """(2, n) the states in which each operator can be reached; num_holding: options that hold their output."""
    after = np.stack([num_holding < num_options, num_holding > 0])
    return np.concatenate([[[True], [False]], after[:, :-1]], axis=1)


def _scaled(seconds: float, shift: int) -> float:
    try:
        return math.ldexp(seconds, shift)
    except OverflowError:
        return sys.float_info.max


def _restrict(profile: Profile, modes: Collection[Mode]) -> tuple[tuple[Option, ...], ...]:
    try:
        allowed = [Mode(mode) for mode in modes]
    except ValueError as error:
        raise InvalidCosts(f"{error}: modes are {', '.join(Mode)}") from None
    if len(set(allowed)) != len(allowed):
        raise InvalidCosts(f"modes lists one twice: {', '.join(allowed)}")
    kept = []
    for index, options in enumerate(profile.options):
        kept.append(tuple(option for option in options if option.mode in allowed))
        if not kept[-1]:
            offered = ", ".join(option.mode for option in options)
            raise InvalidCosts(f"operator {index} has none of the modes {', '.join(allowed)}: it offers {offered}")
    return tuple(kept)

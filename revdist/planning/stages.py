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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from revdist.errors import InvalidCosts
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.kernels import Ints

Number = TypeVar("Number", bound=np.generic)

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
    reached: tuple[tuple[int, ...], ...]
    """Per operator: the states that need a list of their own; none shared or unreachable ones."""

    @property
    def num_operators(self) -> int:
        return len(self.modes)


def arrange(profile: Profile, modes: Collection[Mode] | None = None) -> Stages:
    """Arrays for `profile`, restricted to `modes` where given.

    Raises InvalidCosts for a mode listed twice or unknown and for an operator left without one.
    """
    options = profile.options if modes is None else _restrict(profile, modes)
    slowest_s = sum(max(o.extra_s for o in ops) for ops in options)
    shift = TICK_BITS - math.frexp(slowest_s)[1]
    held = [[[o.held_bytes for o in ops], [o.held_bytes - o.shared_bytes for o in ops]] for ops in options]
    seconds = _padded([[o.extra_s for o in ops] for ops in options], np.float64)
    return Stages(
        modes=tuple(tuple(o.mode for o in ops) for ops in options),
        held=np.stack([_padded([states[s] for states in held], np.int64) for s in (0, 1)]),
        working=_padded([[o.working_bytes for o in ops] for ops in options], np.int64),
        ticks=np.rint(np.ldexp(seconds, shift)).astype(np.int64),
        extra_s=seconds,
        leads_to=_padded([[int(o.holds_output) for o in ops] for ops in options], np.int64),
        reference=_scaled(max(profile.base_s, slowest_s), shift),
        reached=_reached(options),
    )


def _padded(rows: list[list[Any]], dtype: type[Number]) -> npt.NDArray[Number]:
    return np.array([row + [0] * (MAX_OPTIONS - len(row)) for row in rows], dtype=dtype)


def _scaled(seconds: float, shift: int) -> float:
    try:
        return math.ldexp(seconds, shift)
    except OverflowError:
        return sys.float_info.max


def _reached(options: tuple[tuple[Option, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """States that can occur before each operator, only the first of them where both cost the same."""
    reached = []
    states = {0}
    for choices in options:
        shares = any(option.shared_bytes for option in choices)
        reached.append(tuple(sorted(states)) if shares else (min(states),))
        states = {int(option.holds_output) for option in choices}
    return tuple(reached)


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

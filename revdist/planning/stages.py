"""A profile as arrays: what the dynamic program reads, with times counted in ticks.

Seconds become integers, so that sums are exact whatever their order: with floats, equal sums in
another order differ in the last bit, and each such pair would stay in the frontier as two points.
A tick is the power of two that puts the largest possible sum just below 2**50 ticks. An optimum is
therefore the optimum to within n * 2**-51 of that sum, about what a float sum would lose.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import sys
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from revdist.errors import InvalidCosts
from revdist.planning.costs import Before, Mode, Option, Profile
from revdist.planning.kernels import Ints

TICK_BITS = 50
MAX_OPTIONS = len(Mode)
_KEEPS, _HOLDS, _INVERTS = (int(state) for state in Before)  # an enum's member takes numpy ten times as long
_BYTES = ("held_bytes", "shared_bytes", "working_bytes", "handed_bytes", "spared_bytes")
_BYTES_OF = operator.attrgetter(*_BYTES)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Options of n operators, padded to four, in three states: `Before`, what the operator before does."""

    modes: tuple[tuple[Mode, ...], ...]
    """Per operator: the modes its options stand for."""
    held: Ints
    """(3, n, 4) bytes held, by the state in which the operator is reached."""
    working: Ints
    """(3, n, 4) bytes on top, by the same."""
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
    same_as: Ints
    """(n, 3) the first state that costs the same; one that does not occur costs what one does that occurs."""

    @property
    def num_operators(self) -> int:
        return len(self.modes)


def arrange(profile: Profile, modes: Collection[Mode] | None = None) -> Stages:
    """Arrays for `profile`, restricted to `modes` where given.

    Raises InvalidCosts for a mode listed twice or unknown and for an operator left without one.
    """
    operators = profile.options if modes is None else _restrict(profile, modes)
    flat = [option for options in operators for option in options]
    num_options = np.fromiter(map(len, operators), np.int64, len(operators))
    is_option = np.arange(MAX_OPTIONS) < num_options[:, None]
    numbers = np.zeros((len(_BYTES) + 1, len(operators), MAX_OPTIONS), np.int64)
    each = itertools.chain.from_iterable(map(_BYTES_OF, flat))
    numbers[:-1, is_option] = np.fromiter(each, np.int64, len(_BYTES) * len(flat)).reshape(-1, len(_BYTES)).T
    invert = Mode.INVERT
    numbers[-1, is_option] = [
        _HOLDS if option.holds_output else _INVERTS if option.mode is invert else _KEEPS for option in flat
    ]
    held, shared, working, handed, spared, leads_to = numbers
    extra_s = np.zeros((len(operators), MAX_OPTIONS))
    extra_s[is_option] = [option.extra_s for option in flat]
    slowest_s = float(extra_s.max(axis=1).sum())
    shift = TICK_BITS - math.frexp(slowest_s)[1]
    found = _found(leads_to, is_option)
    held = np.stack([held, held - shared, held])[found]
    working = np.stack([working - handed, working - handed - spared, working])[found]
    return Stages(
        modes=tuple([tuple([option.mode for option in options]) for options in operators]),
        held=held,
        working=working,
        ticks=np.rint(np.ldexp(extra_s, shift)).astype(np.int64),
        extra_s=extra_s,
        leads_to=np.ascontiguousarray(leads_to),
        reference=_scaled(max(profile.base_s, slowest_s), shift),
        num_options=num_options,
        same_as=_same_as(held, working),
    )


def _found(leads_to: Ints, is_option: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Index that takes (3, n, 4) bytes by state to those of the states that occur.

    A state in which no option of the operator before leaves off is given another that occurs.
    """
    num_operators = len(leads_to)
    occurs = np.zeros((len(Before), num_operators), np.bool_)
    occurs[Before.KEEPS, 0] = True
    numbers = np.arange(len(Before))[:, None]
    occurs[:, 1:] = ((leads_to == numbers[:, :, None]) & is_option).any(axis=2)[:, :-1]
    states = np.where(occurs, numbers, occurs.argmax(axis=0))
    return states, np.arange(num_operators)


def _same_as(held: Ints, working: Ints) -> Ints:
    same = np.tile(np.arange(len(Before)), (held.shape[1], 1))
    states, others = [2, 2, 1], [1, 0, 0]
    equal = ((held[states] == held[others]) & (working[states] == working[others])).all(axis=2)
    for state, other, where in zip(states, others, equal, strict=True):
        same[where, state] = other
    return same


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

"""How far rebuilt activations may be from the originals: schedules whose runs of INVERT stay accurate.

A run of INVERT ends where the next operator holds its input, or at the end of the chain: there the
output is exact. Backward from that end, operator i of the run finds an output that is off by R_{i+1}
(0 at the end) and adds its own rounding,

    R_i = e_i + g_i R_{i+1}

    e_i  `Profile.reconstruction_error`, the error of its input rebuilt from its exact output
    g_i  `Profile.error_growth`, at least 1: by how much an error of its output grows in its input

R_i bounds the relative error of operator i's rebuilt input by the triangle inequality, as long as
e_i and g_i are what they were in the profile. As every g_i is at least 1, a part of a run is never
off by more than the whole: it is enough to look at the longest runs that are possible.

What the bound does not cover: both were measured on one batch, with the weights of the start and for
the errors that occurred, in norm over the whole input and not in the worst direction or element. And
it bounds activations: the error of the gradients goes with it, but is another number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from revdist.errors import AccuracyUnreachable
from revdist.planning.costs import Mode, Option, Profile


def bounded(profiles: Sequence[Profile], max_reconstruction_error: float) -> tuple[Profile, ...]:
    """The profiles without INVERT where a run of it must end, so that none can exceed the limit.

    profiles: of one chain at several micro-batch sizes; the largest errors at any of them count, so that
      all lose the same options. An error that was not measured counts as infinite.

    Goes through the chain in the direction in which rebuilding does, and ends a run where one operator
    more would be too many. Where an operator offers INVERT alone, the run ends at the nearest one
    behind it that can. Raises AccuracyUnreachable where there is none.
    """
    choices = [_modes(options) for options in zip(*(profile.options for profile in profiles), strict=True)]
    limit = max_reconstruction_error
    run: list[Rounding] = []  # of the operators from the end of the run to the present one
    error = 0.0
    for index in reversed(range(len(choices))):
        if Mode.INVERT not in choices[index]:
            run, error = [], 0.0
            continue
        run.append(_worst(profiles, index))
        error = run[-1].after(error)
        while error > limit:
            end = _nearest_end(choices[index : index + len(run)])
            if end is None:
                raise _unreachable(profiles[0], index, error, limit)
            choices[index + end] -= {Mode.INVERT}
            run = run[len(run) - end :]
            error = _run_error(run)
    return tuple(_offering(profile, choices) for profile in profiles)


def largest_error(profile: Profile, modes: Sequence[Mode]) -> float:
    """The largest error of a rebuilt input under a schedule, by the bound; infinite where not measured."""
    largest = error = 0.0
    for index in reversed(range(len(modes))):
        error = _worst([profile], index).after(error) if modes[index] is Mode.INVERT else 0.0
        largest = max(largest, error)
    return largest


def not_to_be_inverted(profile: Profile) -> frozenset[int]:
    """The operators that do not offer INVERT."""
    return frozenset(
        index for index, options in enumerate(profile.options) if all(o.mode is not Mode.INVERT for o in options)
    )


class Rounding(NamedTuple):
    """What inverting an operator does to errors."""

    own: float
    growth: float

    def after(self, error: float) -> float:
        """The error of the operator's rebuilt input from that of its output."""
        total = self.own + self.growth * error if error else self.own
        return math.inf if math.isnan(total) else total


def _run_error(run: Sequence[Rounding]) -> float:
    """The error at the last of these operators, in the order in which they are inverted."""
    error = 0.0
    for rounding in run:
        error = rounding.after(error)
    return error


def _worst(profiles: Sequence[Profile], index: int) -> Rounding:
    """The largest error and growth of an operator."""
    own = max(_or_infinite(p.reconstruction_error[index]) if p.reconstruction_error else math.inf for p in profiles)
    growth = max(_or_infinite(p.error_growth[index]) if p.error_growth else 1.0 for p in profiles)
    return Rounding(own, max(1.0, growth))


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _modes(options: Sequence[Sequence[Option]]) -> frozenset[Mode]:
    """Modes that an operator offers at every micro-batch size."""
    return frozenset.intersection(*(frozenset(option.mode for option in choices) for choices in options))


def _nearest_end(run: Sequence[frozenset[Mode]]) -> int | None:
    """Of a run in the order of the chain, the first operator that offers another mode."""
    return next((number for number, modes in enumerate(run) if len(modes) > 1), None)


def _offering(profile: Profile, choices: Sequence[frozenset[Mode]]) -> Profile:
    """The profile without INVERT where it is not among the choices."""
    options = tuple(
        tuple(option for option in offered if option.mode is not Mode.INVERT or Mode.INVERT in modes)
        for offered, modes in zip(profile.options, choices, strict=True)
    )
    return dataclasses.replace(profile, options=options)


def _unreachable(profile: Profile, index: int, error: float, limit: float) -> AccuracyUnreachable:
    name = profile.operator_names[index] if profile.operator_names else str(index)
    return AccuracyUnreachable(
        f"operator {name} can only be inverted, and its rebuilt input would be off by {error:.1e}, over "
        f"max_reconstruction_error {limit:.1e}: let it or those after it take SAVE or RECOMPUTE "
        "(planning.modes), or raise the limit",
        operator=name,
        error=error,
        limit=limit,
    )

"""Chains to plan for: three families of sizes, any length, the same for every solver."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from revdist.planning.costs import Mode, Option, Profile

MIB = 2**20
BACKWARD_OVER_FORWARD = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A profile, and what planners that know no inverse need of the same operators."""

    family: str
    profile: Profile
    boundary_bytes: tuple[int, ...]
    """Per operator: its output."""
    forward_s: tuple[float, ...]
    """Per operator: its forward; the backward takes twice as long."""

    @property
    def num_operators(self) -> int:
        return self.profile.num_operators


def revnet_like(num_operators: int) -> Chain:
    """Four stages, each at half the size of the one before, times within 5% as measured ones are."""
    rng = random.Random(num_operators)
    boundaries, internals, seconds = [], [], []
    for index in range(num_operators):
        boundary = 2 ** (3 - index * 4 // num_operators) * MIB
        boundaries.append(boundary)
        internals.append(4 * boundary)
        seconds.append(1e-3 * (1 + 0.05 * rng.random()))
    return _chain("RevNet-like", boundaries, internals, seconds)


def distinct(num_operators: int) -> Chain:
    """Sizes and times all distinct and unrelated."""
    rng = random.Random(num_operators)
    boundaries = [rng.randrange(MIB // 4, 4 * MIB) for _ in range(num_operators)]
    internals = [rng.randrange(MIB, 16 * MIB) for _ in range(num_operators)]
    return _chain("all distinct", boundaries, internals, [1e-3 * rng.uniform(0.2, 3.0) for _ in range(num_operators)])


def proportional(num_operators: int) -> Chain:
    """Sizes all distinct and times proportional to them: no schedule dominates another."""
    rng = random.Random(num_operators)
    internals = [rng.randrange(MIB, 16 * MIB) for _ in range(num_operators)]
    return _chain("time by bytes", [size // 4 for size in internals], internals, [size * 2e-10 for size in internals])


FAMILIES: tuple[Callable[[int], Chain], ...] = (revnet_like, distinct, proportional)


def _chain(family: str, boundaries: list[int], internals: list[int], seconds: list[float]) -> Chain:
    """Working bytes: both gradients to run a backward, and the internals once more to rebuild them."""
    options = []
    for boundary, internal, second in zip(boundaries, internals, seconds, strict=True):
        options.append(
            [
                Option(Mode.SAVE, internal, 2 * boundary, 0.0),
                Option(Mode.INVERT, 0, internal + 3 * boundary, 1.1 * second),
                Option(Mode.RECOMPUTE, boundary, internal + 2 * boundary, second),
            ]
        )
    return Chain(
        family=family,
        profile=Profile.from_options(options, base_s=sum(seconds) * (1 + BACKWARD_OVER_FORWARD)),
        boundary_bytes=tuple(boundaries),
        forward_s=tuple(seconds),
    )

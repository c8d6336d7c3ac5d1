"""The schedules that are tried: some drawn at random, some planned for budgets."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterator

from revdist.planning.costs import Mode, Profile
from revdist.planning.frontier import solve

ON_DEVICE = (Mode.SAVE, Mode.INVERT, Mode.RECOMPUTE)
"""Modes whose memory the kernel sees as the device's: offloaded tensors are resident too on a CPU."""
SAVE_SHARES = (0.2, 0.5, 0.8)
"""How many operators save, about, in a random schedule."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One schedule to run."""

    network: str
    kind: str
    """random or planned"""
    modes: tuple[Mode, ...]
    budget_bytes: int | None = None
    """What a planned one was planned for."""

    @property
    def on_device(self) -> bool:
        return Mode.OFFLOAD not in self.modes


def trials(network: str, profile: Profile, *, num_random: int, num_planned: int) -> list[Trial]:
    """Random and planned schedules with every mode, and as many without OFFLOAD."""
    found = []
    for number, allowed in enumerate((tuple(Mode), ON_DEVICE)):
        limited = restricted(profile, allowed)
        draw = random.Random(number)
        found += [Trial(network=network, kind="random", modes=_random(limited, draw)) for _ in range(num_random)]
        found += _planned(network, limited, num_planned)
    return found


def restricted(profile: Profile, allowed: Collection[Mode]) -> Profile:
    """The profile with these modes alone."""
    options = tuple(tuple(option for option in choices if option.mode in allowed) for choices in profile.options)
    return dataclasses.replace(profile, options=options)


def _random(profile: Profile, draw: random.Random) -> tuple[Mode, ...]:
    share = draw.choice(SAVE_SHARES)
    return tuple(
        options[0].mode if len(options) == 1 or draw.random() < share else draw.choice(options[1:]).mode
        for options in profile.options
    )


def _planned(network: str, profile: Profile, count: int) -> Iterator[Trial]:
    """For budgets from the smallest plan up to the fastest one, evenly spread."""
    frontier = solve(profile)
    low, high = frontier.minimum_bytes, frontier.maximum_bytes
    for number in range(count):
        budget = low + (high - low) * number // max(1, count - 1)
        yield Trial(network=network, kind="planned", modes=frontier.best(budget).modes, budget_bytes=budget)

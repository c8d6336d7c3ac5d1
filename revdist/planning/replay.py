"""An independent simulator that judges schedules: it walks one step and keeps a ledger.

It shares no code with the solver. It goes through the forward of every operator and then the
backward in reverse, adds what each takes, gives back what each releases, and notes the most that
was taken at any moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from revdist.errors import InvalidCosts
from revdist.planning.costs import Before, Mode, Option, Profile, Schedule


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """One operator's turn in a step."""

    phase: Literal["forward", "backward"]
    operator: int
    held_bytes: int
    """Bytes held while it runs, its own and `outside_bytes` included."""
    working_bytes: int
    """Bytes it needs on top. Measured once for both phases, so it is an upper bound in each."""

    @property
    def peak_bytes(self) -> int:
        return self.held_bytes + self.working_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What a schedule takes, moment by moment."""

    need_bytes: int
    """Peak bytes, `outside_bytes` included, `fixed_bytes` not."""
    extra_s: float
    """Seconds over the fastest schedule, added up in chain order."""
    timeline: tuple[Moment, ...]
    """2n moments: the forward of operators 0 to n-1, then their backward in reverse."""


def replay(profile: Profile, modes: Sequence[Mode]) -> Replay:
    """Simulate one micro-batch under `modes`, one per operator.

    Raises InvalidCosts where the number of modes is wrong or an operator does not offer its mode.
    """
    chosen = _chosen(profile, modes)
    held = profile.outside_bytes
    took: list[int] = []
    working: list[int] = []
    timeline: list[Moment] = []
    before = Before.KEEPS
    for operator, option in enumerate(chosen):
        took.append(option.held_bytes)
        working.append(option.working_bytes)
        if before is not Before.INVERTS:
            working[-1] -= option.handed_bytes
        if before is Before.HOLDS:
            took[-1] -= option.shared_bytes
            working[-1] -= option.spared_bytes
        before = option.does
        held += took[-1]
        timeline.append(Moment("forward", operator, held, working[-1]))
    for operator in reversed(range(len(chosen))):
        timeline.append(Moment("backward", operator, held, working[operator]))
        held -= took.pop()
    assert held == profile.outside_bytes
    return Replay(
        need_bytes=max(moment.peak_bytes for moment in timeline),
        extra_s=sum((option.extra_s for option in chosen), start=0.0),
        timeline=tuple(timeline),
    )


def schedule_of(profile: Profile, modes: Sequence[Mode]) -> Schedule:
    """The schedule with these modes and the costs that replay finds."""
    judged = replay(profile, modes)
    return Schedule(modes=tuple(modes), extra_s=judged.extra_s, need_bytes=judged.need_bytes)


def uniform(profile: Profile, mode: Mode) -> Schedule:
    """`mode` on every operator that offers it, and its fastest option on every other one."""
    return schedule_of(profile, [_preferred(options, mode).mode for options in profile.options])


def _preferred(options: Sequence[Option], mode: Mode) -> Option:
    for option in options:
        if option.mode is mode:
            return option
    return min(options, key=lambda option: (option.extra_s, option.held_bytes + option.working_bytes))


def _chosen(profile: Profile, modes: Sequence[Mode]) -> list[Option]:
    if len(modes) != profile.num_operators:
        raise InvalidCosts(f"{len(modes)} modes for {profile.num_operators} operators: give one each")
    chosen = []
    for index, (options, mode) in enumerate(zip(profile.options, modes, strict=True)):
        match = [option for option in options if option.mode == mode]
        if not match:
            offered = ", ".join(option.mode for option in options)
            raise InvalidCosts(f"operator {index} does not offer {mode}: it offers {offered}")
        chosen.append(match[0])
    return chosen

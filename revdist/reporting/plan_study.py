"""What a frontier says to a person: schedules at telling budgets, what more memory buys, which batch is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from revdist.errors import BudgetTooSmall, format_bytes
from revdist.planning.accuracy import largest_error
from revdist.planning.batch import candidates, interpolate
from revdist.planning.costs import Mode, Profile, Schedule
from revdist.planning.frontier import Frontier, solve
from revdist.planning.replay import uniform
from revdist.reporting.phrases import seconds

REACH = 4
"""Micro-batches are looked at up to this many times the largest measured one: costs go on in straight lines."""
STEPS_BYTES = (2**30, 2**20, 2**10, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The best schedule at one budget."""

    budget_bytes: int
    schedule: Schedule
    device: str = ""
    """The device whose budget it is; empty: a budget chosen to look at."""


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPoint:
    """How fast one micro-batch size runs under the best schedule that fits a budget."""

    micro_batch: int
    samples_per_s: float
    schedule: Schedule


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A profile with its frontier, looked at from a few budgets."""

    profile: Profile
    frontier: Frontier
    choices: tuple[Choice, ...]
    """Increasing budgets."""
    too_small: tuple[int, ...] = ()
    """Budgets asked about that hold no schedule."""
    curves: tuple[tuple[int, tuple[BatchPoint, ...]], ...] = ()
    """Per budget: throughput by micro-batch. Empty: the profiles are of one micro-batch only."""
    focus: Choice
    """The choice looked at closely."""

    @property
    def all_invert(self) -> Schedule:
        return uniform(self.profile, Mode.INVERT)

    @property
    def all_save(self) -> Schedule:
        return uniform(self.profile, Mode.SAVE)


def study(
    profiles: Sequence[Profile],
    budgets_bytes: Sequence[int] = (),
    *,
    devices: Mapping[str, int] | None = None,
    modes: Sequence[Mode] | None = None,
    guarantee: float = 0.01,
) -> Study:
    """Solve the profile of the largest micro-batch and look at it from `budgets_bytes`.

    Without budgets: from the budgets of `devices`, by name, and from five in equal steps, the smallest
    possible one to the one at which nothing is gained any more. In focus is the largest budget asked
    about, else the smallest device, else the middle step.
    Raises BudgetTooSmall where none of the given budgets holds any schedule.
    """
    ordered = sorted(profiles, key=lambda profile: profile.micro_batch)
    profile = ordered[-1]
    frontier = solve(profile, guarantee=guarantee, modes=modes)
    owners = {} if budgets_bytes else {budget: name for name, budget in (devices or {}).items()}
    steps = telling_budgets(frontier)
    budgets = sorted(set(budgets_bytes)) or sorted({*owners, *steps})
    if budgets[-1] < frontier.minimum_bytes:
        raise BudgetTooSmall(budgets[-1], frontier.minimum_bytes, remedy="lower micro_batch or raise --budget")
    choices = tuple(
        Choice(budget, frontier.best(budget), owners.get(budget, ""))
        for budget in budgets
        if budget >= frontier.minimum_bytes
    )
    closest = budgets[-1] if budgets_bytes else min(owners, default=steps[len(steps) // 2])
    return Study(
        profile=profile,
        frontier=frontier,
        choices=choices,
        too_small=tuple(budget for budget in budgets if budget < frontier.minimum_bytes),
        curves=throughput(ordered, budgets, modes=modes) if len(ordered) > 1 else (),
        focus=next(choice for choice in choices if choice.budget_bytes >= closest),
    )


def letter(index: int) -> str:
    """The name of a chosen budget: a, b, c, ..., z, 27, 28, ..."""
    return chr(ord("a") + index) if index < 26 else str(index + 1)


def telling_budgets(frontier: Frontier, count: int = 5) -> list[int]:
    """Budgets in equal steps from the smallest possible one to the largest that still buys time."""
    low, high = frontier.minimum_bytes, frontier.maximum_bytes
    return sorted({low + (high - low) * index // (count - 1) for index in range(count)})


def headline(found: Study) -> str:
    """`14 operators, micro-batch 32: 354 ms at best; 312 schedules on the frontier, exact`."""
    profile, frontier = found.profile, found.frontier
    kind = "exact" if frontier.guarantee == 0 else f"within {frontier.guarantee:.1%} of the optimum"
    return (
        f"{profile.num_operators} operators, micro-batch {profile.micro_batch}: "
        f"{seconds(profile.base_s)} at best; {len(frontier)} schedules on the frontier, {kind}"
    )


def step_bytes(frontier: Frontier) -> int:
    """The 'one more': a GiB for large models, else the unit that is about a tenth of what can be bought."""
    span = frontier.maximum_bytes - frontier.minimum_bytes
    return next((step for step in STEPS_BYTES if step * 6 <= span), 1)


def one_more(found: Study) -> str:
    """What one more GiB (or MiB) would buy at the budget in focus."""
    frontier, base_s = found.frontier, found.profile.base_s
    budget, now = found.focus.budget_bytes, found.focus.schedule
    fastest_bytes = frontier.maximum_bytes
    step_s = base_s + now.extra_s
    place = f"{found.focus.device}: at" if found.focus.device else "At"
    place += f" {format_bytes(budget)} a micro-batch of {found.profile.micro_batch} takes {seconds(step_s)}"
    if budget >= fastest_bytes:
        return f"{place}, the fastest there is: more memory would buy nothing."
    over = f", {now.extra_s / base_s:.0%} over the fastest" if base_s else ""
    more = step_bytes(frontier)
    saved_s = now.extra_s - frontier.best(budget + more).extra_s
    buys = f"save {seconds(saved_s)} ({saved_s / step_s:.1%})" if saved_s else "change nothing"
    if not saved_s:
        following = frontier.schedule(frontier.index(budget) + 1)
        next_s, next_bytes = now.extra_s - following.extra_s, following.need_bytes - budget
        if following.need_bytes < fastest_bytes:
            buys += f", {format_bytes(next_bytes)} more would save {seconds(next_s)}"
    rest = format_bytes(fastest_bytes - budget)
    return f"{place}{over}. One more {unit_name(more)} would {buys}; {rest} more would save all {seconds(now.extra_s)}."


def accuracy(found: Study) -> str:
    """How far inverted activations are from the originals; empty where that was not measured."""
    profile = found.profile
    if not profile.reconstruction_error or Mode.INVERT not in found.all_invert.modes:
        return ""
    most = largest_error(profile, found.all_invert.modes)
    if most == 0:
        return "Inverted activations equalled the originals to the bit when they were measured."
    focus = largest_error(profile, found.focus.schedule.modes)
    return (
        f"Inverted activations are off by at most {focus:.1e} at {format_bytes(found.focus.budget_bytes)}, "
        f"by {most:.1e} with INVERT wherever it may be."
    )


def unit_name(step: int) -> str:
    """`GiB` for 1.0 GiB, as in 'one more GiB'; steps that are no whole unit in full, '16.0 MiB'."""
    number, unit = format_bytes(step).split()
    return unit if float(number) == 1 else f"{float(number):.0f} {unit}"


def throughput(
    profiles: Sequence[Profile], budgets_bytes: Sequence[int], *, modes: Sequence[Mode] | None = None
) -> tuple[tuple[int, tuple[BatchPoint, ...]], ...]:
    """Per budget: samples per second by micro-batch, as far as any fits.

    From the smallest measured micro-batch, below which a straight line says little, to `REACH` times the largest.
    """
    sizes = [size for size in candidates(REACH * profiles[-1].micro_batch) if size >= profiles[0].micro_batch]
    solved = [(size, interpolate(profiles, size)) for size in sizes]
    frontiers = [(size, profile.base_s, solve(profile, modes=modes)) for size, profile in solved]
    curves = []
    for budget in budgets_bytes:
        points = []
        for size, base_s, frontier in frontiers:
            if frontier.minimum_bytes > budget:
                break
            schedule = frontier.best(budget)
            points.append(BatchPoint(size, size / (base_s + schedule.extra_s), schedule))
        curves.append((budget, tuple(points)))
    return tuple(curves)


def best_batch(found: Study, budget_bytes: int) -> BatchPoint | None:
    """The micro-batch with the most samples per second within a budget; None where that is not known."""
    points = dict(found.curves).get(budget_bytes, ())
    return max(points, key=lambda point: (point.samples_per_s, point.micro_batch), default=None)

"""One budget solved alone, against the frontier of all."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import ANY_SECONDS, every_schedule, profiles, true_frontier

from revdist.errors import BudgetTooSmall, InvalidCosts, UsageError
from revdist.planning import single, sweep
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.frontier import solve
from revdist.planning.replay import replay
from revdist.planning.single import solve_at


def distinct(num_operators: int, seed: int = 0) -> Profile:
    """No two sizes or times alike; a third of the operators share their input with the one before."""
    rng = random.Random(seed)
    options = []
    for _ in range(num_operators):
        size, second = rng.randrange(2**16, 2**24), rng.uniform(0.5, 2.0)
        shared = size // 4 if rng.random() < 0.3 else 0
        options.append(
            [
                Option(Mode.SAVE, size, size // 8, 0.0, shared, True),
                Option(Mode.INVERT, 0, size // 2, second),
                Option(Mode.RECOMPUTE, size // 3, size // 3, 0.8 * second, shared),
            ]
        )
    return Profile.from_options(options)


@given(profiles(), st.booleans())
def test_equals_trying_everything_on_every_budget(profile: Profile, hasty: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "FIRST_POINTS", 1 if hasty else single.FIRST_POINTS)
        for need, extra in true_frontier(profile):
            assert solve_at(profile, need).extra_s == extra
            assert solve_at(profile, need).need_bytes <= need


@given(profiles(seconds=ANY_SECONDS), st.floats(0, 0.5))
def test_a_guarantee_holds(profile: Profile, guarantee: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "FIRST_POINTS", 1)
        slowest_s = sum(max(option.extra_s for option in options) for options in profile.options)
        for need, extra in true_frontier(profile):
            schedule = solve_at(profile, need, guarantee=guarantee)
            assert schedule.need_bytes <= need
            assert schedule.extra_s <= extra + guarantee * (slowest_s + extra) + 1e-9


@pytest.mark.parametrize("num_operators", [30, 100])
def test_equals_the_exact_frontier_of_long_chains(num_operators: int) -> None:
    profile = distinct(num_operators)
    frontier = solve(profile, guarantee=0.0)
    for index in np.linspace(0, len(frontier) - 1, 12).astype(int):
        budget = int(frontier.budgets_bytes[index])
        schedule = solve_at(profile, budget)
        assert schedule.extra_s == pytest.approx(float(frontier.extra_s[index]), rel=1e-12)
        judged = replay(profile, schedule.modes)
        assert (judged.need_bytes, judged.extra_s) == (schedule.need_bytes, schedule.extra_s)
        assert judged.need_bytes <= budget


def test_beats_or_equals_a_thinned_frontier_where_the_exact_one_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = distinct(60)
    monkeypatch.setattr(sweep, "LIST_POINTS", 200)
    thinned = solve(profile)
    assert thinned.guarantee > 0
    for budget in np.linspace(thinned.minimum_bytes, thinned.maximum_bytes, 7).astype(int).tolist():
        assert solve_at(profile, budget).extra_s <= thinned.best(budget).extra_s


def test_a_state_in_which_nothing_fits() -> None:
    """After holding its output, the first operator leaves too little for any option of the second."""
    profile = Profile.from_options(
        [
            [Option(Mode.SAVE, 50, 0, 0.0, 0, True), Option(Mode.INVERT, 10, 0, 1.0)],
            [Option(Mode.SAVE, 40, 0, 0.0, 5), Option(Mode.INVERT, 30, 0, 1.0, 2)],
            [Option(Mode.SAVE, 5, 0, 0.0, 5, True), Option(Mode.RECOMPUTE, 5, 0, 0.0, 4)],
        ]
    )
    for budget in range(45, 100):
        fitting = [judged.extra_s for _, judged in every_schedule(profile) if judged.need_bytes <= budget]
        assert solve_at(profile, budget).extra_s == min(fitting)


def test_modes_restrict_the_choice() -> None:
    assert solve_at(distinct(5), 2**40, modes=[Mode.INVERT]).strip == "IIIII"


def test_a_budget_below_the_minimum_says_what_is_missing() -> None:
    profile = distinct(20)
    minimum = solve(profile).minimum_bytes
    assert solve_at(profile, minimum).need_bytes == minimum
    with pytest.raises(BudgetTooSmall) as caught:
        solve_at(profile, minimum - 1)
    assert caught.value.missing_bytes == 1


def test_times_proportional_to_bytes_need_a_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    sizes = [rng.randrange(2**16, 2**24) for _ in range(40)]
    profile = Profile.from_options(
        [[Option(Mode.SAVE, size, 0, 0.0), Option(Mode.INVERT, 0, size // 2, size / 2**30)] for size in sizes]
    )
    monkeypatch.setattr(sweep, "MOST_POINTS", 2 * single.FIRST_POINTS)
    with pytest.raises(UsageError, match="allow a larger guarantee"):
        solve_at(profile, sum(sizes) // 2)
    schedule = solve_at(profile, sum(sizes) // 2, guarantee=0.001)
    assert schedule.need_bytes <= sum(sizes) // 2
    assert schedule.extra_s <= (sum(sizes) // 2 + 2**23) / 2**30


def test_budgets_may_be_floats_and_without_end() -> None:
    profile = distinct(5)
    minimum = solve(profile).minimum_bytes
    assert solve_at(profile, minimum + 0.9).need_bytes == minimum
    assert solve_at(profile, float("inf")).strip == "SSSSS"
    with pytest.raises(BudgetTooSmall):
        solve_at(profile, -float("inf"))
    with pytest.raises(InvalidCosts, match="not a number"):
        solve_at(profile, float("nan"))


def test_wrong_guarantees_are_refused() -> None:
    with pytest.raises(InvalidCosts, match="must be finite and not negative"):
        solve_at(distinct(3), 2**40, guarantee=-1.0)

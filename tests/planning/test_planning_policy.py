"""Decisions told as stories: readings come in, at times passed in."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planning_split import linear

from revdist.errors import InvalidCosts
from revdist.planning.policy import Keep, Replan, Rules, Standing, Stop, budget_of, decide, resplit

RULES = Rules(min_change=0.1, settle_s=1.0)
STANDING = Standing(budget_bytes=1000, need_bytes=900, minimum_bytes=300)


def tell(*readings: tuple[float, int], standing: Standing = STANDING, rules: Rules = RULES):
    """The decision after the last of several (time, budget) readings, all before it having been to keep."""
    decision = Keep(standing)
    for now_s, budget_bytes in readings:
        assert isinstance(decision, Keep), f"decided before {now_s} s: {decision}"
        decision = decide(decision.standing, budget_bytes, now_s, rules)
    return decision


def test_budget_adds_what_the_allocator_can_reuse_and_takes_off_the_rest() -> None:
    budget = budget_of(
        1000, 500, 300, margin_bytes=50, fragmentation=0.1, activation_bytes=100, pending_bytes=200
    )  # fmt: skip
    assert budget == 1200 - 120 + 100 - 200 - 50


def test_budget_rounds_down_and_never_below_zero() -> None:
    assert budget_of(15, 0, 0, fragmentation=0.1) == 13
    assert budget_of(10, 0, 0, margin_bytes=50) == 0
    assert budget_of(10, 0, 40) == 0
    assert budget_of(1000, 0, 0, limit_bytes=70) == 70
    with pytest.raises(InvalidCosts, match=r"fragmentation is 1\.0"):
        budget_of(10, 0, 0, fragmentation=1.0)


@given(*[st.integers(0, 2**40)] * 3, st.floats(0, 0.99), *[st.integers(0, 2**30)] * 2)
def test_budget_never_exceeds_what_is_there(free, reserved, allocated, fragmentation, margin, pending) -> None:
    budget = budget_of(
        free, reserved, allocated, fragmentation=fragmentation, margin_bytes=margin, pending_bytes=pending
    )
    assert 0 <= budget <= max(0, free + reserved - allocated)


def test_memory_that_is_lost_is_met_at_once() -> None:
    assert tell((0.0, 899)) == Replan(899, "memory-lost")
    assert tell((0.0, 300)) == Replan(300, "memory-lost")


def test_less_memory_that_still_holds_the_plan_changes_nothing() -> None:
    assert tell((0.0, 900)) == Keep(STANDING)


def test_gained_memory_is_used_after_it_stayed() -> None:
    assert isinstance(tell((5.0, 2000), (5.5, 2000), (5.9, 2000)), Keep)
    assert tell((5.0, 2000), (5.5, 2000), (6.0, 2000)) == Replan(2000, "memory-gained")


def test_only_what_was_free_throughout_is_used() -> None:
    assert tell((5.0, 2000), (5.5, 1500), (6.0, 3000)) == Replan(1500, "memory-gained")


def test_a_break_starts_the_wait_again() -> None:
    assert isinstance(tell((5.0, 2000), (5.5, 1000), (6.0, 2000), (6.5, 2000)), Keep)
    assert tell((5.0, 2000), (5.5, 1000), (6.0, 2000), (7.0, 2000)) == Replan(2000, "memory-gained")


def test_a_small_gain_is_not_worth_a_replan() -> None:
    assert tell(*((float(second), 1100) for second in range(10))) == Keep(STANDING)


def test_a_device_too_small_for_any_plan_stops_and_says_what_is_missing() -> None:
    stopped = tell((0.0, 299))
    assert isinstance(stopped, Stop)
    assert stopped.missing_bytes == 1
    assert stopped.reason == (
        "299 B are left for activations and the smallest plan needs 300 B: free 1 B on the device"
    )


def test_with_patience_the_smallest_plan_waits_before_it_stops() -> None:
    patient = Rules(patience_s=2.0)
    assert tell((0.0, 200), rules=patient) == Replan(300, "memory-lost")
    smallest = Standing(budget_bytes=300, need_bytes=300, minimum_bytes=300)
    assert isinstance(tell((0.0, 200), (1.9, 200), standing=smallest, rules=patient), Keep)
    assert isinstance(tell((0.0, 200), (1.0, 400), (2.0, 200), standing=smallest, rules=patient), Keep)
    assert isinstance(tell((0.0, 200), (1.9, 200), (2.0, 200), standing=smallest, rules=patient), Stop)


@given(st.lists(st.integers(300, 3000), min_size=1, max_size=50), st.floats(0, 2))
def test_no_plan_ever_stands_over_its_budget(budgets: list[int], settle_s: float) -> None:
    rules = Rules(settle_s=settle_s)
    standing = STANDING
    for tick, budget in enumerate(budgets):
        decision = decide(standing, budget, tick / 2, rules)
        assert not isinstance(decision, Stop)
        if isinstance(decision, Replan):
            assert decision.budget_bytes <= budget
            need = max(300, decision.budget_bytes - 50)
            standing = Standing(budget_bytes=decision.budget_bytes, need_bytes=need, minimum_bytes=300)
        else:
            standing = decision.standing
        assert standing.need_bytes <= budget


def noisy(seconds: float, seed: int, steps: int = 16, *, spread: float = 0.05) -> list[float]:
    rng = random.Random(seed)
    return [seconds * rng.uniform(1 - spread, 1 + spread) for _ in range(steps)]


def steps(*by_replica: list[float]) -> list[tuple[float, ...]]:
    return list(zip(*by_replica, strict=True))


def test_shares_follow_a_device_that_became_slow_and_stays_slow() -> None:
    decision = resplit([linear(1.0), linear(1.0)], (30, 30), steps(noisy(30.0, 1), noisy(60.0, 2)))
    assert decision is not None
    assert decision.shares[0] == pytest.approx(40, abs=2)
    assert sum(decision.shares) == 60
    assert decision.gain == pytest.approx(1 - 40 / 60, abs=0.07)
    assert decision.factors == pytest.approx((1.0, 2.0), abs=0.1)


@pytest.mark.parametrize(
    ("what", "measured"),
    [
        ("as predicted", steps(noisy(30.0, 1), noisy(30.0, 2))),
        ("one slow step", steps(noisy(30.0, 1), [*noisy(30.0, 2, 15), 300.0])),
        ("slow only at the end", steps(noisy(30.0, 1), noisy(30.0, 2, 10) + noisy(60.0, 3, 6))),
        ("slow only at the start", steps(noisy(30.0, 1), noisy(60.0, 2, 8) + noisy(30.0, 3, 8))),
        ("one step", [(30.0, 60.0)]),
        ("all equally slow", steps(noisy(60.0, 1), noisy(60.0, 2))),
        ("untimed", [(0.0, 0.0)] * 16),
    ],
)
def test_shares_stay(what: str, measured: list[tuple[float, ...]]) -> None:
    assert resplit([linear(1.0), linear(1.0)], (30, 30), measured) is None


@pytest.mark.parametrize("measured", [[(0.0, 30.0)] * 16, [(30.0, 60.0)] * 7])
def test_what_was_not_timed_or_too_little_changes_nothing(measured: list[tuple[float, ...]]) -> None:
    assert resplit([linear(1.0), linear(1.0)], (30, 30), measured) is None


def test_a_small_difference_shows_where_steps_are_steady() -> None:
    measured = steps(noisy(50.0, 1, spread=0.01), noisy(54.0, 2, spread=0.01))
    decision = resplit([linear(1.0), linear(1.0)], (50, 50), measured, min_gain=0.01)
    assert decision is not None
    assert decision.shares == (52, 48)
    assert resplit([linear(1.0), linear(1.0)], (50, 50), measured) is None


def test_a_moderate_difference_shows_through_noise_in_many_steps() -> None:
    def found(num_steps: int, seed: int) -> bool:
        measured = steps(noisy(50.0, 2 * seed, num_steps, spread=0.2), noisy(60.0, 2 * seed + 1, num_steps, spread=0.2))
        return resplit([linear(1.0), linear(1.0)], (50, 50), measured, min_gain=0.0125) is not None

    few, many = (sum(found(num_steps, seed) for seed in range(100)) for num_steps in (16, 256))
    assert few < 50
    assert many > 95

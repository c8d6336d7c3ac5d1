"""The frontier against trying everything, judged by the simulator."""

from __future__ import annotations

import json
import random

import hypothesis
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import ANY_SECONDS, every_schedule, profiles, true_frontier

from revdist.errors import BudgetTooSmall, InvalidCosts, UsageError
from revdist.planning import kernels, sweep
from revdist.planning.batch import step_time_curve
from revdist.planning.costs import MAX_BYTES, Mode, Option, Profile
from revdist.planning.frontier import Frontier, solve
from revdist.planning.replay import replay
from revdist.planning.single import solve_at
from revdist.planning.split import split

GIB = 2**30


def revnet_like(num_operators: int, seed: int = 0) -> Profile:
    """Four stages of falling sizes, three modes, times jittered as measured ones are."""
    rng = random.Random(seed)
    options = []
    for index in range(num_operators):
        size = 2 ** (24 - index * 4 // num_operators)
        second = 1e-3 * (1 + 0.05 * rng.random())
        options.append(
            [
                Option(Mode.SAVE, 4 * size, size, 0.0),
                Option(Mode.INVERT, 0, 5 * size, second),
                Option(Mode.RECOMPUTE, size, 5 * size, 0.9 * second),
            ]
        )
    return Profile.from_options(options, base_s=num_operators * 3e-3)


def proportional(num_operators: int, seed: int = 0) -> Profile:
    """All sizes distinct and time proportional to bytes: no schedule dominates another."""
    rng = random.Random(seed)
    sizes = [rng.randrange(2**16, 2**24) for _ in range(num_operators)]
    return Profile.from_options(
        [[Option(Mode.SAVE, size, 0, 0.0), Option(Mode.INVERT, 0, size // 2, size * 2.0**-30)] for size in sizes]
    )


@given(profiles())
def test_equals_trying_everything_on_every_budget(profile: Profile) -> None:
    frontier = solve(profile)
    assert list(zip(frontier.budgets_bytes.tolist(), frontier.extra_s.tolist(), strict=True)) == true_frontier(profile)
    assert frontier.guarantee == 0.0


@given(profiles(seconds=ANY_SECONDS, max_size=5))
def test_equals_trying_everything_with_any_seconds(profile: Profile) -> None:
    frontier = solve(profile)
    slowest_s = sum(max(option.extra_s for option in options) for options in profile.options)
    for need, extra in true_frontier(profile):
        best = frontier.best(need)
        assert best.need_bytes <= need
        assert best.extra_s <= extra + 1e-12 * slowest_s


@given(profiles(seconds=ANY_SECONDS, max_size=12))
def test_every_schedule_costs_what_replay_says_to_the_bit(profile: Profile) -> None:
    frontier = solve(profile)
    for index in range(len(frontier)):
        schedule = frontier.schedule(index)
        judged = replay(profile, schedule.modes)
        assert (judged.need_bytes, judged.extra_s) == (schedule.need_bytes, schedule.extra_s)


@given(profiles(), st.integers(0, 400))
def test_best_is_never_over_budget_and_never_misses_a_plan(profile: Profile, budget_bytes: int) -> None:
    frontier = solve(profile)
    fitting = [judged.extra_s for _, judged in every_schedule(profile) if judged.need_bytes <= budget_bytes]
    if fitting:
        best = frontier.best(budget_bytes)
        assert best.extra_s == min(fitting)
        assert replay(profile, best.modes).need_bytes <= budget_bytes
    else:
        with pytest.raises(BudgetTooSmall) as caught:
            frontier.best(budget_bytes)
        assert caught.value.missing_bytes == frontier.minimum_bytes - budget_bytes > 0


@given(profiles(seconds=ANY_SECONDS, max_size=20))
def test_more_memory_is_never_slower(profile: Profile) -> None:
    frontier = solve(profile)
    assert (np.diff(frontier.budgets_bytes) > 0).all()
    assert (np.diff(frontier.extra_s) < 0).all()
    assert frontier.minimum_bytes >= profile.outside_bytes


@given(profiles(min_size=4, max_size=8))
def test_bounded_history_and_short_segments_change_nothing(profile: Profile) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "HISTORY_POINTS", 0)
        patch.setattr(sweep, "SEGMENT_OPERATORS", 1)
        recomputed = solve(profile)
    assert recomputed == solve(profile)


@pytest.mark.parametrize("make", [revnet_like, proportional])
@pytest.mark.parametrize("guarantee", [1e-3, 1e-2, 0.3])
def test_thinned_lists_keep_their_guarantee(make, guarantee: float, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = make(14)
    exact = solve(profile)
    monkeypatch.setattr(sweep, "LIST_POINTS", 20)
    monkeypatch.setattr(sweep, "HISTORY_POINTS", 100)
    monkeypatch.setattr(sweep, "SEGMENT_OPERATORS", 1)
    thinned = solve(profile, guarantee=guarantee)
    assert 0.0 < thinned.guarantee <= guarantee
    assert len(thinned) < len(exact)
    reference_s = max(profile.base_s, float(exact.extra_s[0]))
    for index, budget in enumerate(exact.budgets_bytes.tolist()):
        optimum = float(exact.extra_s[index])
        best = thinned.best(budget)
        assert best.extra_s <= optimum + thinned.guarantee * (reference_s + optimum)
        assert replay(profile, best.modes).need_bytes == best.need_bytes <= budget
        assert replay(profile, best.modes).extra_s == best.extra_s


@hypothesis.settings(max_examples=300)
@given(profiles(min_size=3, max_size=8, base_s=st.floats(0, 100)), st.floats(1e-6, 1.0))
def test_thinning_keeps_its_guarantee_on_any_chain(profile: Profile, guarantee: float) -> None:
    exact = solve(profile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "LIST_POINTS", 2)
        patch.setattr(sweep, "CHOICE_BYTES", 2)
        patch.setattr(sweep, "HISTORY_POINTS", 4)
        patch.setattr(sweep, "SEGMENT_OPERATORS", 1)
        thinned = solve(profile, guarantee=guarantee)
    assert thinned.guarantee <= guarantee
    assert thinned.minimum_bytes == exact.minimum_bytes
    slowest_s = sum(max(option.extra_s for option in options) for options in profile.options)
    reference_s = max(profile.base_s, slowest_s)
    for budget, optimum in zip(exact.budgets_bytes.tolist(), exact.extra_s.tolist(), strict=True):
        judged = replay(profile, thinned.best(budget).modes)
        assert (judged.need_bytes, judged.extra_s) == (thinned.best(budget).need_bytes, thinned.best(budget).extra_s)
        assert thinned.best(budget).extra_s <= optimum + thinned.guarantee * (reference_s + optimum) + 1e-9


def test_a_hopeless_exact_answer_is_refused_not_attempted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MOST_POINTS", 1000)
    with pytest.raises(UsageError, match="over the limit of 1000: allow a larger guarantee"):
        solve(proportional(30), guarantee=0.0)


def test_hard_chains_stay_bounded_and_within_one_percent() -> None:
    frontier = solve(proportional(300))
    assert 0 < frontier.guarantee <= 0.01
    assert len(frontier) <= sweep.LIST_POINTS
    assert frontier.choices.nbytes <= sweep.CHOICE_BYTES


def test_a_thousand_operators_are_exact() -> None:
    profile = revnet_like(1000)
    frontier = solve(profile)
    assert frontier.guarantee == 0.0
    for index in np.linspace(0, len(frontier) - 1, 5).astype(int):
        schedule = frontier.schedule(index)
        judged = replay(profile, schedule.modes)
        assert (judged.need_bytes, judged.extra_s) == (schedule.need_bytes, schedule.extra_s)


def test_modes_restrict_the_choice() -> None:
    profile = revnet_like(8)
    inverted = solve(profile, modes=[Mode.INVERT])
    assert len(inverted) == 1
    assert inverted.schedule(0).strip == "IIIIIIII"
    assert len(solve(profile, modes=(Mode.SAVE, Mode.INVERT))) < len(solve(profile))


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (["SAVE", "SAVE"], "modes lists one twice: SAVE, SAVE"),
        (["SAVED"], "'SAVED' is not a valid Mode"),
        (["OFFLOAD"], "operator 0 has none of the modes OFFLOAD: it offers SAVE, INVERT, RECOMPUTE"),
    ],
)
def test_wrong_modes_are_refused(modes: list[str], message: str) -> None:
    with pytest.raises(InvalidCosts, match=message):
        solve(revnet_like(3), modes=modes)


@pytest.mark.parametrize("guarantee", [-0.1, float("nan"), float("inf")])
def test_wrong_guarantees_are_refused(guarantee: float) -> None:
    with pytest.raises(InvalidCosts, match="must be finite and not negative"):
        solve(revnet_like(3), guarantee=guarantee)


def test_extreme_costs_neither_overflow_nor_vanish() -> None:
    huge = [Option(Mode.SAVE, MAX_BYTES // 4, 0, 0.0), Option(Mode.INVERT, 0, MAX_BYTES // 4, 1e300)]
    tiny = [Option(Mode.SAVE, 1, 0, 0.0), Option(Mode.INVERT, 0, 0, 5e-324)]
    assert solve(Profile.from_options([huge, huge])).extra_s.tolist() == [1e300, 0.0]  # SI needs as much as SS
    assert solve(Profile.from_options([tiny, tiny], base_s=1e300)).extra_s.tolist() == [1e-323, 5e-324, 0.0]


@pytest.mark.parametrize("budget", [0, -1, -float("inf"), 0.5])
def test_budgets_below_the_minimum_say_what_is_missing(budget: float) -> None:
    frontier = solve(Profile.from_options([[Option(Mode.SAVE, 3 * GIB, GIB, 0.0)]]))
    with pytest.raises(BudgetTooSmall, match=r"below the smallest possible plan, 4.* missing"):
        frontier.best(budget)


def test_budgets_may_be_floats_and_are_rounded_down() -> None:
    frontier = solve(Profile.from_options([[Option(Mode.SAVE, 10, 0, 0.0), Option(Mode.INVERT, 0, 5, 1.0)]]))
    assert frontier.best(9.999).strip == "I"
    assert frontier.best(float("inf")).strip == "S"
    with pytest.raises(InvalidCosts, match="not a number"):
        frontier.best(float("nan"))


@given(profiles(seconds=ANY_SECONDS, max_size=9))
def test_json_round_trip(profile: Profile) -> None:
    frontier = solve(profile)
    again = Frontier.from_json(frontier.to_json())
    assert again == frontier
    assert again.best(frontier.maximum_bytes) == frontier.best(frontier.maximum_bytes)


def test_arrays_are_read_only() -> None:
    frontier = solve(revnet_like(3))
    with pytest.raises(ValueError, match="read-only"):
        frontier.extra_s[0] = 0.0


def test_warming_up_leaves_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.warm_up()
    compiled = [kernels.sweep_back, kernels.walk, kernels.thin, kernels.extend, kernels.prune, kernels.shares_within]
    before = [len(kernel.signatures) for kernel in compiled]
    assert before == [1] * len(compiled)
    frontier = solve(revnet_like(20))
    solve_at(revnet_like(20), frontier.minimum_bytes * 2)
    monkeypatch.setattr(sweep, "LIST_POINTS", 8)
    monkeypatch.setattr(sweep, "CHOICE_BYTES", 1)
    solve(revnet_like(20))
    split([step_time_curve([revnet_like(20)], frontier.maximum_bytes, max_share=9)] * 2, 9)
    assert [len(kernel.signatures) for kernel in compiled] == before


def test_compiling_without_a_writable_cache_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numba.njit

    def without_cache(*args, cache=False, **kwargs):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(*args, **kwargs)

    monkeypatch.setattr(numba, "njit", without_cache)
    assert kernels.compiled(lambda x: x + 1)(1) == 2


def _mutations() -> st.SearchStrategy[object]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))


SMALL_JSON = solve(revnet_like(3)).to_json()


@given(st.data())
@hypothesis.settings(max_examples=150)
def test_json_reader_refuses_damage_with_a_clear_error(data: st.DataObject) -> None:
    fields = json.loads(SMALL_JSON)
    damaged = data.draw(st.sampled_from(sorted(fields)))
    if data.draw(st.booleans()):
        del fields[damaged]
    else:
        fields[damaged] = data.draw(_mutations())
    try:
        frontier = Frontier.from_json(json.dumps(fields))
    except InvalidCosts:
        return
    frontier.best(frontier.maximum_bytes)  # what is accepted works


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_json_reader_refuses_any_text(text: str) -> None:
    with pytest.raises(InvalidCosts):
        Frontier.from_json(text)

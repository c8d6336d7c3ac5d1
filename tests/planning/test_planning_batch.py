"""Interpolated profiles and step-time curves, against trying every micro-batch."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revdist.errors import BudgetTooSmall, InvalidCosts
from revdist.planning.batch import (
    Cut,
    StepTimeCurve,
    candidates,
    interpolate,
    micro_batch_sizes,
    step_time_curve,
)
from revdist.planning.costs import Mode, Option, Profile, Schedule
from revdist.planning.frontier import solve
from revdist.planning.replay import replay


def measured(micro_batch: int, num_operators: int = 4) -> Profile:
    """A chain whose costs are exactly constant + slope * micro_batch."""
    options = []
    for index in range(num_operators):
        activation = (300 + 10 * index) * micro_batch
        options.append(
            [
                Option(Mode.SAVE, activation + 7, 100 * micro_batch + 50, 0.0, 100 * micro_batch, True),
                Option(Mode.INVERT, 5, 200 * micro_batch + 60, 0.25 + 0.125 * micro_batch),
            ]
        )
    return Profile.from_options(
        options,
        micro_batch=micro_batch,
        base_s=1.0 + 0.5 * micro_batch,
        outside_bytes=40 * micro_batch,
        fixed_bytes=900,
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 8, 13, 32])
@pytest.mark.parametrize("sizes", [(2, 8), (2, 4, 8), (1, 3, 16)])
def test_affine_costs_are_recovered_exactly(micro_batch: int, sizes: tuple[int, ...]) -> None:
    assert interpolate([measured(size) for size in sizes], micro_batch) == measured(micro_batch)


@given(
    low=st.integers(0, 1000), high=st.integers(0, 1000), sizes=st.sets(st.integers(1, 40), min_size=2, max_size=2),
    micro_batch=st.integers(1, 80),
)  # fmt: skip
def test_bytes_are_rounded_up(low: int, high: int, sizes: set[int], micro_batch: int) -> None:
    small, large = sorted(sizes)
    profiles = [
        Profile.from_options([[Option(Mode.SAVE, held, 0, 0.0)]], micro_batch=size)
        for held, size in ((low, small), (high, large))
    ]
    held = interpolate(profiles, micro_batch).options[0][0].held_bytes
    line = low + (high - low) * (micro_batch - small) / (large - small)
    if high < low and not small <= micro_batch <= large:
        assert held == low  # a falling line is noise: it is not followed beyond what was measured
    else:
        assert max(0, line) - 1e-6 <= held < max(0, line) + 1


def test_one_profile_is_scaled_in_proportion() -> None:
    scaled = interpolate([Profile.from_options([[Option(Mode.SAVE, 10, 3, 1.0)]], micro_batch=4, base_s=2.0)], 6)
    assert scaled.options[0][0] == Option(Mode.SAVE, 15, 5, 1.5)
    assert (scaled.base_s, scaled.micro_batch) == (3.0, 6)


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], "no profile"),
        ([measured(2), measured(2)], r"same micro_batch: \[2, 2\]"),
        ([measured(2), measured(4, num_operators=3)], "differ in operators or modes: profile one model"),
    ],
)
def test_profiles_that_do_not_belong_together_are_refused(profiles: list[Profile], message: str) -> None:
    with pytest.raises(InvalidCosts, match=message):
        interpolate(profiles, 3)


def test_candidates_are_all_small_sizes_then_four_per_doubling() -> None:
    assert candidates(5) == (1, 2, 3, 4, 5)
    assert candidates(40) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 38, 40)
    assert len(candidates(4096)) < 48


@given(st.integers(1, 500), st.integers(1, 50))
def test_micro_batches_cover_the_share_evenly(share: int, steps: int) -> None:
    sizes = micro_batch_sizes(share, min(share, steps))
    assert sum(sizes) == share
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes) == -(-share // len(sizes))


@pytest.mark.parametrize("budget", [1500, 3000, 6000, 12000, 50000])
def test_the_curve_is_the_best_of_every_micro_batch(budget: int) -> None:
    """Affine costs: compare with the sum over micro-batches of all sizes and all numbers of them."""
    profiles = [measured(1), measured(8)]
    curve = step_time_curve(profiles, budget, max_share=20, overhead_s=0.5)
    for share in range(1, 21):
        best = float("inf")
        for steps in range(1, share + 1):
            sizes = micro_batch_sizes(share, steps)
            if sizes[0] > 8:
                continue
            frontier = solve(measured(sizes[0]))
            if frontier.minimum_bytes > budget:
                continue
            modes = frontier.best(budget).modes
            best = min(best, sum(measured(s).base_s + replay(measured(s), modes).extra_s for s in sizes))
        assert curve.step_s(share) <= 0.5 + best + 1e-9
        choice = curve.choice(share)
        sizes = micro_batch_sizes(share, choice.accumulation_steps)
        assert choice.micro_batch == sizes[0]
        replays = [replay(measured(size), choice.schedule.modes) for size in sizes]
        assert max(judged.need_bytes for judged in replays) <= budget
        true_s = 0.5 + sum(measured(s).base_s + judged.extra_s for s, judged in zip(sizes, replays, strict=True))
        assert choice.step_s == pytest.approx(true_s) == pytest.approx(curve.step_s(share))


def test_step_times_never_fall_with_the_share_nor_rise_with_the_budget() -> None:
    profiles = [measured(2), measured(16)]
    curves = [step_time_curve(profiles, budget, max_share=200) for budget in (2000, 4000, 8000, 40000)]
    for curve in curves:
        times = [curve.step_s(share) for share in range(1, 201)]
        assert times == sorted(times)
    for tight, ample in itertools.pairwise(curves):
        assert all(ample.step_s(share) <= tight.step_s(share) + 1e-9 for share in range(1, 201))


def test_one_profile_keeps_its_micro_batch_while_it_fits() -> None:
    profile = measured(8)
    assert step_time_curve([profile], 10**6, max_share=100).choice(20).micro_batch == 7  # three of at most eight
    small = step_time_curve([profile], solve(profile).minimum_bytes - 1, max_share=100)
    assert [cut.micro_batch for cut in small.cuts] == [7]


def test_given_micro_batches_are_the_only_ones() -> None:
    curve = step_time_curve([measured(2), measured(8)], 10**6, max_share=100, micro_batches=[4])
    assert [cut.micro_batch for cut in curve.cuts] == [4]
    assert curve.choice(3).micro_batch == 3


def test_a_budget_too_small_for_one_sample_says_what_is_missing() -> None:
    with pytest.raises(BudgetTooSmall, match=r"on a micro-batch of 1: .* missing; free that much") as caught:
        step_time_curve([measured(2), measured(8)], 100, max_share=10)
    assert caught.value.minimum_bytes == solve(measured(1)).minimum_bytes


def test_the_optimizer_step_must_fit_too() -> None:
    profiles = [Profile.from_options([[Option(Mode.SAVE, 10, 0, 0.0)]], step_peak_bytes=500)]
    with pytest.raises(BudgetTooSmall, match="500 B"):
        step_time_curve(profiles, 499, max_share=4)


def test_modes_restrict_the_schedules() -> None:
    curve = step_time_curve([measured(2), measured(8)], 10**6, max_share=8, modes=[Mode.INVERT])
    assert {cut.schedule.strip for cut in curve.cuts} == {"IIII"}


@pytest.mark.parametrize("share", [0, -1, 21])
def test_shares_outside_the_curve_are_refused(share: int) -> None:
    with pytest.raises(InvalidCosts, match="this curve covers 1 to 20 samples"):
        step_time_curve([measured(2)], 10**6, max_share=20).step_s(share)


@pytest.mark.parametrize("max_share", [0, -3, 2**24 + 1])
def test_impossible_largest_shares_are_refused(max_share: int) -> None:
    with pytest.raises(InvalidCosts, match="it must lie between"):
        step_time_curve([measured(2)], 10**6, max_share=max_share)


@given(st.integers(1500, 60000), st.floats(0, 10))
def test_curve_json_round_trip(budget: int, overhead_s: float) -> None:
    curve = step_time_curve([measured(2), measured(8)], budget, max_share=64, overhead_s=overhead_s)
    assert StepTimeCurve.from_json(curve.to_json()) == curve


def test_scaled_curves_scale_every_time() -> None:
    curve = step_time_curve([measured(2), measured(8)], 10**6, max_share=64, overhead_s=0.5)
    assert curve.scaled(2.0).step_s(30) == pytest.approx(2 * curve.step_s(30))


CURVE = StepTimeCurve(
    max_share=8,
    cuts=(Cut(micro_batch=4, micro_batch_s=0.1, sample_s=0.2, schedule=Schedule(modes=(Mode.SAVE, Mode.INVERT))),),
)


@given(st.data())
def test_curve_reader_refuses_damage_with_a_clear_error(data: st.DataObject) -> None:
    fields = json.loads(CURVE.to_json())
    target = data.draw(st.sampled_from([fields, fields["cuts"][0], fields["cuts"][0]["schedule"]]))
    name = data.draw(st.sampled_from(sorted(target)))
    target[name] = data.draw(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()))
    try:
        curve = StepTimeCurve.from_json(json.dumps(fields))
    except InvalidCosts:
        return
    assert curve.step_s(1) >= 0


def test_a_small_micro_batch_never_costs_less_than_its_proportion() -> None:
    options = [[Option(Mode.SAVE, 1, 1, 0.0)]]
    profiles = [Profile.from_options(options, micro_batch=size, base_s=s) for size, s in ((8, 0.04), (32, 0.4))]
    assert interpolate(profiles, 2).base_s == pytest.approx(0.01)
    assert interpolate(profiles, 20).base_s == pytest.approx(0.22)


def test_a_large_micro_batch_never_costs_less_than_the_largest_measured() -> None:
    """A line that falls for noise would make some size cost nothing, and that would be chosen."""
    options = [[Option(Mode.SAVE, 1, 1, 0.0), Option(Mode.INVERT, 0, 1, 0.0)]]
    profiles = [Profile.from_options(options, micro_batch=size, base_s=s) for size, s in ((2, 0.4), (4, 0.2))]
    assert interpolate(profiles, 8).base_s == pytest.approx(0.2)
    curve = step_time_curve(profiles, 100, max_share=10)
    assert all(curve.step_s(share) > 0 for share in range(1, 11))

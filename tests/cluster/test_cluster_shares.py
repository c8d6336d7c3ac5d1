"""Shares follow curves and measured times, and not noise."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from runs import settings

from revdist.cluster.shares import ShareKeeper
from revdist.config import RunConfig
from revdist.planning.batch import Cut, StepTimeCurve
from revdist.planning.costs import Mode, Schedule
from revdist.training.reports import CurveReport
from revdist.training.row import Row

BATCH = 60


def curve(sample_s: float, most: int = BATCH) -> StepTimeCurve:
    cut = Cut(micro_batch=most, micro_batch_s=0.0, sample_s=sample_s, schedule=Schedule(modes=(Mode.SAVE,)))
    return StepTimeCurve(max_share=most, cuts=(cut,))


def report(rank: int, sample_s: float, reason: str = "start") -> CurveReport:
    inverted = None if reason == "start" else curve(2 * sample_s)
    return CurveReport(rank=rank, curve=curve(sample_s), inverted=inverted, reason=reason, num_steps=9)


def keeper(**changes: Any) -> ShareKeeper:
    return ShareKeeper(RunConfig.from_mapping(settings(global_batch=BATCH, **changes)), (0, 1))


def rows(shares: tuple[int, ...], seconds: tuple[float, ...], generation: int) -> list[Row]:
    pairs = zip(shares, seconds, strict=True)
    return [Row(share=share, generation=generation, compute_s=compute_s) for share, compute_s in pairs]


def started(*sample_s: float, **changes: Any) -> ShareKeeper:
    kept = keeper(**changes)
    for reason in ("start", "profile"):
        for rank, seconds in enumerate(sample_s):
            kept.take_curve(rank, report(rank, seconds, reason))
    return kept


def test_the_first_shares_wait_for_every_rank_and_not_for_the_solver() -> None:
    kept = keeper()
    assert kept.take_curve(1, report(1, 0.02)) is None
    assert kept.shares is None
    first = kept.take_curve(0, report(0, 0.01))
    assert first is not None
    assert (first.generation, first.by_rank, first.reason) == (0, (30, 30), "start")
    assert kept.gains() == {}


def test_shares_follow_speed_once_every_rank_has_its_plan() -> None:
    kept = keeper()
    for rank in (0, 1):
        kept.take_curve(rank, report(rank, 0.01))
    assert kept.take_curve(1, report(1, 0.02, "profile")) is None
    following = kept.take_curve(0, report(0, 0.01, "profile"))
    assert following is not None
    assert (following.generation, following.by_rank, following.reason) == (1, (40, 20), "share")


def test_shares_that_may_not_change_are_right_from_the_start() -> None:
    kept = started(0.01, 0.02, replan={"shares": False})
    assert kept.shares is not None
    assert (kept.shares.generation, kept.shares.by_rank) == (0, (40, 20))


def test_a_group_that_forms_before_there_is_a_profile_has_equal_shares() -> None:
    kept = keeper()
    for rank, seconds in ((0, 0.0), (1, 0.0), (2, 0.01)):
        kept.take_curve(rank, report(rank, seconds))
    assert kept.regroup((1, 2), reason="share").by_rank == (30, 30)


def test_a_model_too_small_to_be_timed_keeps_equal_shares() -> None:
    kept = started(0.0, 0.0)
    assert kept.shares is not None
    assert kept.shares.by_rank == (30, 30)
    assert kept.take_curve(1, report(1, 0.0, "memory-lost")) is None
    assert kept.take_curve(1, report(1, 0.01, "memory-lost")) is None


def test_equal_shares_can_be_asked_for() -> None:
    kept = started(0.01, 0.02, planning={"share": "equal"})
    assert kept.shares is not None
    assert kept.shares.by_rank == (30, 30)
    assert kept.take_curve(1, report(1, 0.05, "memory-lost")) is None


def test_a_device_that_becomes_slower_for_want_of_memory_gets_less() -> None:
    kept = started(0.01, 0.01)
    following = kept.take_curve(1, report(1, 0.02, "memory-lost"))
    assert following is not None
    assert (following.generation, following.by_rank) == (1, (40, 20))


def test_a_gain_that_is_too_small_changes_nothing() -> None:
    assert started(0.01, 0.01).take_curve(1, report(1, 0.0102, "memory-lost")) is None


def test_shares_stay_where_they_may_not_change() -> None:
    assert started(0.01, 0.01, replan={"shares": False}).take_curve(1, report(1, 0.03, "memory-lost")) is None


def test_measured_times_change_shares_once_they_persist() -> None:
    kept = started(0.01, 0.01)
    slow = [kept.take_rows(rows((30, 30), (0.3, 0.6), 0)) for _ in range(16)]
    assert slow[:15] == [None] * 15
    assert slow[15] is not None
    assert slow[15].by_rank == (40, 20)


def test_short_steps_are_watched_for_longer() -> None:
    kept = started(0.01, 0.01, replan={"settle_s": 1.0})
    taken = [kept.take_rows(rows((30, 30), (0.01, 0.02), 0)) for _ in range(55)]
    changed = [number for number, shares in enumerate(taken) if shares is not None]
    assert changed == [49]  # 50 steps of 20 ms


def test_one_slow_step_is_noise() -> None:
    kept = started(0.01, 0.01)
    times = [(0.3, 0.3)] * 15 + [(0.3, 3.0)]
    assert all(kept.take_rows(rows((30, 30), seconds, 0)) is None for seconds in times)


def first_change(kept: ShareKeeper, times: Iterable[tuple[float, ...]]) -> tuple[int, tuple[int, ...]] | None:
    """After how many steps shares change, and to what."""
    assert kept.shares is not None
    shares = kept.shares
    for number, seconds in enumerate(times, start=1):
        following = kept.take_rows(rows(shares.by_rank, seconds, shares.generation))
        if following is not None:
            return number, following.by_rank
    return None


def test_a_small_difference_shows_in_many_steps_and_not_in_few() -> None:
    rng = random.Random(0)
    times = [(0.3 * rng.uniform(0.95, 1.05), 0.324 * rng.uniform(0.95, 1.05)) for _ in range(256)]
    found = first_change(started(0.01, 0.01), times)
    assert found is not None
    number, shares = found
    assert number in (32, 64, 128, 256), "where more windows than one are looked at"
    assert shares == (31, 29)


@pytest.mark.parametrize(
    ("slower", "num_steps"), [(1.13, 16), (1.07, 32), (1.035, 64), (1.018, 128), (1.009, 256), (1.004, None)]
)
def test_steady_steps_show_a_difference_once_its_sum_is_worth_a_change(slower: float, num_steps: int | None) -> None:
    """Half of the difference is what other shares would save."""
    kept = ShareKeeper(RunConfig.from_mapping(settings(global_batch=6000)), (0, 1))
    wide = curve(1e-4, 6000)
    for rank in (0, 1):
        kept.take_curve(rank, CurveReport(rank=rank, curve=wide, inverted=wide, reason="profile", num_steps=9))
    found = first_change(kept, [(0.3, 0.3 * slower)] * 1000)
    assert (None if found is None else found[0]) == num_steps


@pytest.mark.parametrize(("num_replicas", "correlation", "spread"), [(2, 0.8, 0.05), (8, 0.5, 0.05), (6, 0.0, 0.2)])
def test_noise_does_not_change_shares_whether_steps_follow_each_other_or_not(
    num_replicas: int, correlation: float, spread: float
) -> None:
    """2,000 steps of equal devices, each slow for some steps in a row, then fast."""
    kept = ShareKeeper(RunConfig.from_mapping(settings(global_batch=BATCH)), range(num_replicas))
    for reason in ("start", "profile"):
        for rank in range(num_replicas):
            kept.take_curve(rank, report(rank, 0.01, reason))
    rng = random.Random(1)
    now = [0.0] * num_replicas

    def noise() -> Iterator[tuple[float, ...]]:
        for _ in range(2000):
            for rank, before in enumerate(now):
                fresh = math.sqrt(1 - correlation**2) * rng.gauss(0, spread)
                now[rank] = correlation * before + fresh
            yield tuple(0.3 * math.exp(value) for value in now)

    assert first_change(kept, noise()) is None


def test_steps_under_other_shares_do_not_count() -> None:
    kept = started(0.01, 0.01)
    kept.take_curve(1, report(1, 0.02, "memory-lost"))
    assert all(kept.take_rows(rows((30, 30), (0.3, 0.9), 0)) is None for _ in range(40))


def test_gains_are_those_that_measured_steps_confirm() -> None:
    """A neighbour that no profile knows of makes one device half as fast: unequal shares gain."""
    kept = started(0.01, 0.01)
    assert first_change(kept, [(0.3, 0.6)] * 16) == (16, (40, 20))
    gains = kept.gains()
    assert gains["over_equal_split"] == pytest.approx(0.6 / 0.4)
    assert gains["over_all_invert"] == pytest.approx(2.0)
    assert str(gains["basis"]).endswith("corrected by measured steps")


def test_gains_are_ratios_of_predicted_step_times() -> None:
    gains = started(0.01, 0.02).gains()
    assert gains["over_all_invert"] == 2.0
    assert gains["over_equal_split"] == 0.6 / 0.4


def test_curves_that_no_member_has_any_more_are_not_kept() -> None:
    kept = started(0.01, 0.01)
    for number in range(100):
        kept.take_curve(number % 2, report(number % 2, 0.01 + number / 1000, "memory-lost"))
    assert len(kept._known) <= 10
    for rank in (0, 1):
        kept.take_curve(rank, report(rank, 0.5, "memory-lost"))
    assert len({id(one) for one in kept._curves.values()}) == 1, "equal ones are one object"

"""Shares follow curves and measured times, and not noise."""

from __future__ import annotations

import random
from typing import Any

from runs import settings

from revdist.cluster.shares import ShareKeeper
from revdist.config import RunConfig
from revdist.planning.batch import Cut, StepTimeCurve
from revdist.planning.costs import Mode, Schedule
from revdist.training.reports import CurveReport
from revdist.training.row import Row

BATCH = 60


def curve(sample_s: float) -> StepTimeCurve:
    cut = Cut(micro_batch=BATCH, micro_batch_s=0.0, sample_s=sample_s, schedule=Schedule(modes=(Mode.SAVE,)))
    return StepTimeCurve(max_share=BATCH, cuts=(cut,))


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


def test_a_small_difference_is_found_in_many_steps() -> None:
    kept = started(0.01, 0.01)
    rng = random.Random(0)
    pairs = [(0.3 * rng.uniform(0.8, 1.2), 0.36 * rng.uniform(0.8, 1.2)) for _ in range(256)]
    found = [shares for times in pairs if (shares := kept.take_rows(rows((30, 30), times, 0))) is not None]
    assert [shares.by_rank for shares in found[:1]] in ([(32, 28)], [(33, 27)], [(34, 26)])


def test_steps_under_other_shares_do_not_count() -> None:
    kept = started(0.01, 0.01)
    kept.take_curve(1, report(1, 0.02, "memory-lost"))
    assert all(kept.take_rows(rows((30, 30), (0.3, 0.9), 0)) is None for _ in range(40))


def test_gains_are_ratios_of_predicted_step_times() -> None:
    gains = started(0.01, 0.02).gains()
    assert gains["over_all_invert"] == 2.0
    assert gains["over_equal_split"] == 0.6 / 0.4

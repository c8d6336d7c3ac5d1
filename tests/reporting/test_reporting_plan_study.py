from __future__ import annotations

import dataclasses

import pytest
from sample_profiles import KIB, profile

from revdist.errors import BudgetTooSmall
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.replay import replay
from revdist.reporting.plan_study import (
    REACH,
    accuracy,
    best_batch,
    letter,
    one_more,
    step_bytes,
    study,
    throughput,
    unit_name,
)

MIB = 2**20


def test_without_budgets_the_study_spans_the_frontier() -> None:
    found = study([profile()])
    assert len(found.choices) == 5
    assert found.choices[0].budget_bytes == found.frontier.minimum_bytes
    assert found.choices[-1].schedule.extra_s == 0
    assert found.focus is found.choices[2]
    assert found.curves == ()


def test_every_choice_fits_its_budget_in_replay() -> None:
    found = study([profile()], [8 * MIB, 12 * MIB])
    for choice in found.choices:
        assert replay(found.profile, choice.schedule.modes).need_bytes <= choice.budget_bytes
    assert found.focus.budget_bytes == 12 * MIB


def test_budgets_that_hold_nothing_are_named_unless_all_are() -> None:
    found = study([profile()], [KIB, 16 * MIB])
    assert found.too_small == (KIB,)
    assert [choice.budget_bytes for choice in found.choices] == [16 * MIB]
    with pytest.raises(BudgetTooSmall):
        study([profile()], [KIB])


def test_devices_are_looked_at_by_name_and_the_smallest_closely() -> None:
    found = study([profile()], devices={"large": 16 * MIB, "small": 9 * MIB})
    named = {choice.device: choice.budget_bytes for choice in found.choices if choice.device}
    assert named == {"small": 9 * MIB, "large": 16 * MIB}
    assert found.focus.device == "small"
    assert len(found.choices) == 7
    assert one_more(found).startswith("small: at 9.0 MiB")


def test_a_device_too_small_for_the_micro_batch_is_named_too_small() -> None:
    found = study([profile()], devices={"tiny": KIB})
    assert found.too_small == (KIB,)
    assert found.focus is found.choices[0]


def test_the_extremes_are_what_needs_no_planner() -> None:
    found = study([profile()])
    assert set(found.all_save.modes) == {Mode.SAVE}
    assert Mode.INVERT in found.all_invert.modes


def test_one_more_says_what_it_buys() -> None:
    found = study([profile()], [10 * MIB])
    more = step_bytes(found.frontier)
    saved_ms = 1e3 * (found.frontier.best(10 * MIB).extra_s - found.frontier.best(10 * MIB + more).extra_s)
    sentence = one_more(found)
    assert sentence.startswith("At 10.0 MiB a micro-batch of 32 takes ")
    assert f"One more {unit_name(more)} would save {saved_ms:.3g} ms" in sentence


def test_where_one_more_changes_nothing_the_next_gain_is_named() -> None:
    sizes = 2 * MIB + 10, 20 * MIB  # one more MiB at the start does not reach the first gain
    measured = Profile.from_options(
        [[Option(Mode.SAVE, size, 0, 0.0), Option(Mode.INVERT, 0, 0, 0.002)] for size in sizes], base_s=0.01
    )
    found = study([measured], [5])
    assert one_more(found) == (
        "At 5 B a micro-batch of 1 takes 14 ms, 40% over the fastest. One more MiB would change nothing, "
        "2.0 MiB more would save 2 ms; 22.0 MiB more would save all 4 ms."
    )


def test_where_everything_is_kept_more_memory_buys_nothing() -> None:
    assert "more memory would buy nothing" in one_more(study([profile()], [2**40]))


def test_units_of_one_more() -> None:
    assert [unit_name(step) for step in (2**30, 2**20, 2**24)] == ["GiB", "MiB", "16 MiB"]


def test_throughput_rises_with_the_budget_and_stops_where_nothing_fits() -> None:
    small, large = throughput([profile(8), profile(32)], [6 * MIB, 40 * MIB])
    sizes = [point.micro_batch for point in large[1]]
    assert sizes[0] == 8
    assert sizes[-1] <= REACH * 32
    assert len(small[1]) < len(large[1])
    for low, high in zip(small[1], large[1], strict=False):
        assert low.samples_per_s <= high.samples_per_s * (1 + 1e-9)


def test_the_best_batch_is_the_fastest_point() -> None:
    found = study([profile(8), profile(32)])
    budget = found.choices[1].budget_bytes
    best = best_batch(found, budget)
    assert best is not None
    assert best.samples_per_s == max(point.samples_per_s for point in dict(found.curves)[budget])
    assert best_batch(study([profile()]), budget) is None


def test_budgets_are_lettered() -> None:
    assert [letter(index) for index in (0, 25, 26)] == ["a", "z", "27"]


def test_the_accuracy_of_the_schedule_in_focus_and_of_the_least_accurate_one() -> None:
    errors = tuple(0.0 if index % 4 == 0 else 1e-3 for index in range(12))
    measured = dataclasses.replace(profile(), reconstruction_error=errors)
    assert accuracy(study([measured], [2**30])) == (
        "Inverted activations are off by at most 0.0e+00 at 1.0 GiB, by 3.0e-03 with INVERT wherever it may be."
    )
    exact = dataclasses.replace(profile(), reconstruction_error=(0.0,) * 12)
    assert "to the bit" in accuracy(study([exact]))
    assert accuracy(study([profile()])) == ""

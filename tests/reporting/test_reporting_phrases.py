from __future__ import annotations

import dataclasses

import pytest

from revdist.planning.costs import Mode, Plan, Schedule
from revdist.reporting.phrases import byte_unit, mode_counts, plan_change, rate, seconds, time_unit

PLAN = Plan(
    generation=0,
    rank=1,
    device="CPU-1",
    share=44,
    micro_batch=16,
    accumulation_steps=3,
    schedule=Schedule(modes=(Mode.SAVE,) * 3),
    budget_bytes=2**20,
    predicted_step_s=0.1,
    predicted_peak_bytes=2**20,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.00084, "840 us"),
        (0.0123, "12.3 ms"),
        (0.9996, "1 s"),
        (4.2, "4.2 s"),
        (59.99, "60 s"),
        (185, "3:05 min"),
        (7650, "2:07:30 h"),
    ],
)
def test_seconds_read_in_the_unit_that_fits(value: float, text: str) -> None:
    assert seconds(value) == text


def test_rates_keep_three_digits() -> None:
    assert [rate(value) for value in (1234.6, 100, 9.876, 0.5)] == ["1,235", "100", "9.88", "0.5"]


def test_units_follow_the_largest_value() -> None:
    assert byte_unit([3, 5 * 2**20]) == ("MiB", 2**20)
    assert byte_unit([]) == ("B", 1)
    assert time_unit([0.02, 0.3]) == ("ms", 1e-3)


def test_strips_in_words() -> None:
    assert mode_counts("SSIIIRO") == "2 kept, 3 rebuilt, 1 recomputed, 1 offloaded"


def test_a_first_plan_says_what_it_runs() -> None:
    assert plan_change(PLAN, None, None) == "first plan: 44 samples a step in micro-batches of 16; 3 kept"


def test_a_replan_says_why_and_what_changes() -> None:
    squeezed = dataclasses.replace(
        PLAN, reason="memory-lost", share=40, schedule=Schedule(modes=(Mode.INVERT, Mode.INVERT, Mode.SAVE))
    )
    assert plan_change(squeezed, PLAN, 30 * 2**20) == (
        "less memory is free (30.0 MiB): share 44 -> 40 samples; 1 kept, 2 rebuilt (was 3 kept)"
    )


def test_a_plan_that_changes_nothing_says_so() -> None:
    again = dataclasses.replace(PLAN, reason="memory-gained")
    assert plan_change(again, PLAN, None) == "more memory is free: same schedule"

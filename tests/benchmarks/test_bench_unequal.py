"""The benchmark of unequal devices: what it makes of the steps it sees."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.provenance import command_line
from benchmarks.unequal.losses import Losses, StepTimes


def step(step_s: float, shares: tuple[int, ...], compute_s: tuple[float, ...]) -> StepTimes:
    return StepTimes(step_s=step_s, shares=shares, compute_s=compute_s)


def test_devices_in_step_lose_nothing_but_the_exchange() -> None:
    losses = Losses.of([step(1.25, (30, 10), (1.0, 1.0))] * 3)
    assert dataclasses.astuple(losses) == pytest.approx((0.8, 0, 0, 0.2))


def test_shares_that_do_not_fit_are_told_from_steps_that_vary() -> None:
    shares_off = Losses.of([step(2.0, (20, 20), (2.0, 1.0))] * 2)
    assert dataclasses.astuple(shares_off) == pytest.approx((2 / 3, 1 / 3, 0, 0))
    varying = Losses.of([step(2.0, (20, 20), (2.0, 1.0)), step(2.0, (20, 20), (1.0, 2.0))])
    assert dataclasses.astuple(varying) == pytest.approx((0.75, 0, 0.25, 0))


seconds = st.floats(0.01, 10)


@given(st.lists(st.tuples(st.integers(1, 63), seconds, seconds, st.floats(0, 1)), min_size=1, max_size=20))
def test_parts_add_up(drawn: list[tuple[int, float, float, float]]) -> None:
    steps = [step(max(a, b) + rest, (share, 64 - share), (a, b)) for share, a, b, rest in drawn]
    parts = dataclasses.astuple(Losses.of(steps))
    assert sum(parts) == pytest.approx(1)
    assert parts[3] >= -1e-9
    assert parts[1] >= -1e-9


def test_a_record_of_the_run_is_read() -> None:
    ranks = [{"share": 40, "compute_s": 0.5, "rank": 0}, {"share": 24, "compute_s": 0.4, "rank": 1}]
    assert StepTimes.of_record({"step_s": 0.6, "ranks": ranks}) == step(0.6, (40, 24), (0.5, 0.4))


def test_a_page_names_the_whole_command_and_no_folder() -> None:
    given = ["--cases", "a", "b", "--out", "/some/where", "--turn", "4"]
    assert command_line("python benchmarks/it.py", given) == "python benchmarks/it.py --cases a b --turn 4"

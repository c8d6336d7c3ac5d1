"""Shares against trying every split."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revdist.errors import BatchTooSmall, UsageError
from revdist.planning.batch import Cut, StepTimeCurve
from revdist.planning.costs import Mode, Schedule
from revdist.planning.split import equal_split, slowest_s, split

SCHEDULE = Schedule(modes=(Mode.SAVE,))
SECONDS = st.integers(0, 16).map(lambda eighths: eighths / 8) | st.floats(0, 3)


def linear(sample_s: float, *, max_share: int = 1000, overhead_s: float = 0.0) -> StepTimeCurve:
    cut = Cut(micro_batch=max_share, micro_batch_s=0.0, sample_s=sample_s, schedule=SCHEDULE)
    return StepTimeCurve(max_share=max_share, cuts=(cut,), overhead_s=overhead_s)


@st.composite
def curves(draw: st.DrawFn) -> StepTimeCurve:
    cuts = [
        Cut(micro_batch=size, micro_batch_s=draw(SECONDS), sample_s=draw(SECONDS), schedule=SCHEDULE)
        for size in sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=3)), reverse=True)
    ]
    return StepTimeCurve(max_share=draw(st.integers(1, 9)), cuts=tuple(cuts), overhead_s=draw(SECONDS))


def every_split(num_replicas: int, global_batch: int) -> list[tuple[int, ...]]:
    return [
        shares
        for shares in itertools.product(range(1, global_batch + 1), repeat=num_replicas)
        if sum(shares) == global_batch
    ]


@given(st.lists(curves(), min_size=1, max_size=4), st.integers(1, 10))
def test_equals_trying_every_split(devices: list[StepTimeCurve], global_batch: int) -> None:
    possible = [
        slowest_s(devices, shares)
        for shares in every_split(len(devices), global_batch)
        if all(share <= device.max_share for share, device in zip(shares, devices, strict=True))
    ]
    if global_batch < len(devices):
        with pytest.raises(BatchTooSmall):
            split(devices, global_batch)
    elif not possible:
        with pytest.raises(UsageError, match="missing"):
            split(devices, global_batch)
    else:
        shares = split(devices, global_batch)
        assert sum(shares) == global_batch
        assert all(1 <= share <= device.max_share for share, device in zip(shares, devices, strict=True))
        assert slowest_s(devices, shares) == min(possible)


def test_a_device_twice_as_fast_gets_twice_as_much() -> None:
    assert split([linear(1.0), linear(0.5)], 30) == (10, 20)


def test_equal_devices_get_equal_shares_and_earlier_ones_the_remainder() -> None:
    assert split([linear(1.0)] * 3, 11) == (4, 4, 3)
    assert split([linear(1.0) for _ in range(3)], 11) == (4, 4, 3)


def test_a_device_too_slow_for_one_sample_does_not_drag_the_others() -> None:
    """Its one sample decides the step, but the others are still balanced among themselves."""
    assert split([linear(100.0), linear(1.0), linear(1.0)], 21) == (1, 10, 10)


def test_a_full_device_leaves_the_rest_to_others() -> None:
    assert split([linear(0.001, max_share=5), linear(1.0), linear(1.0)], 25) == (5, 10, 10)


def test_devices_whose_times_are_all_zero() -> None:
    assert split([linear(0.0, max_share=4), linear(0.0, max_share=4)], 8) == (4, 4)


def test_the_missing_samples_are_named() -> None:
    with pytest.raises(UsageError, match="global_batch is 30 but the devices take 25 samples together, 5 missing"):
        split([linear(1.0, max_share=10), linear(1.0, max_share=15)], 30)


@pytest.mark.parametrize("divide", [split, lambda devices, batch: equal_split(batch, len(devices))])
def test_fewer_samples_than_replicas_are_refused(divide) -> None:
    with pytest.raises(
        BatchTooSmall, match="global_batch is 2 for 3 replicas: raise it to 3 at least, or use fewer replicas, 2 at"
    ):
        divide([linear(1.0)] * 3, 2)
    with pytest.raises(UsageError, match="no replicas"):
        divide([], 2)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_equal_split_differs_by_one_at_most(num_replicas: int, more: int) -> None:
    shares = equal_split(num_replicas + more, num_replicas)
    assert sum(shares) == num_replicas + more
    assert max(shares) - min(shares) <= 1


def test_ten_thousand_distinct_devices() -> None:
    rng = random.Random(0)
    devices = [
        StepTimeCurve(
            max_share=4096,
            cuts=tuple(
                Cut(micro_batch=size, micro_batch_s=rng.uniform(0, 1e-3), sample_s=rng.uniform(1, 4), schedule=SCHEDULE)
                for size in (64, 32, 16)
            ),
            overhead_s=rng.uniform(0, 0.1),
        )
        for _ in range(10_000)
    ]
    shares = split(devices, 1_000_000)
    assert sum(shares) == 1_000_000
    slowest = slowest_s(devices, shares)
    # No sample less on the slowest device can be made up for: every other one would be slower with one more.
    assert all(device.step_s(share + 1) >= slowest for device, share in zip(devices, shares, strict=True))
    assert slowest < slowest_s(devices, equal_split(1_000_000, 10_000))

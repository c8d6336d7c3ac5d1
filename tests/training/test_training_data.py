"""Every sample once per epoch, whatever the shares."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revdist.errors import ConfigError
from revdist.training.data import DataOrder, check_map_style, consecutive, fetch, micro_batches, slice_of

shares = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda parts: sum(parts) > 0)


@given(st.integers(1, 60), st.data())
def test_an_epoch_uses_every_sample_once_while_shares_change(num_samples: int, data: st.DataObject) -> None:
    order = DataOrder(num_samples=num_samples, global_batch=data.draw(st.integers(1, num_samples)), seed=3)
    epoch = data.draw(st.integers(0, 3))
    used: list[int] = []
    for position in range(order.steps_per_epoch):
        batch = order.batch(epoch * order.steps_per_epoch + position)
        parts = data.draw(shares)
        for rank in range(len(parts)):
            for chosen in micro_batches(batch[slice_of(parts, rank, len(batch))], data.draw(st.integers(1, 8))):
                used += chosen.tolist()
    assert sorted(used) == list(range(num_samples))


def test_the_largest_seed_orders_the_data_and_starts_the_model() -> None:
    order = DataOrder(num_samples=8, global_batch=8, seed=2**64 - 1)
    assert sorted(order.batch(0).tolist()) == list(range(8))
    with torch.random.fork_rng():
        torch.manual_seed(order.seed)


@given(shares)
def test_a_full_batch_is_cut_exactly_into_the_shares(parts: list[int]) -> None:
    slices = [slice_of(parts, rank, sum(parts)) for rank in range(len(parts))]
    assert [part.stop - part.start for part in slices] == parts


@given(shares, st.integers(0, 50))
def test_a_smaller_batch_is_cut_in_proportion(parts: list[int], num_samples: int) -> None:
    sizes = [part.stop - part.start for part in (slice_of(parts, rank, num_samples) for rank in range(len(parts)))]
    assert sum(sizes) == num_samples
    assert all(abs(size - num_samples * part / sum(parts)) < 1 for size, part in zip(sizes, parts, strict=True))


def test_the_order_depends_on_seed_epoch_and_step_alone() -> None:
    first, again = (DataOrder(num_samples=20, global_batch=6, seed=1) for _ in range(2))
    later = [first.batch(step) for step in (7, 0, 3)]
    assert all(np.array_equal(batch, again.batch(step)) for batch, step in zip(later, (7, 0, 3), strict=True))
    assert not np.array_equal(first.batch(0), first.batch(4)), "epochs differ"
    assert not np.array_equal(first.batch(0), DataOrder(num_samples=20, global_batch=6, seed=2).batch(0))


def test_steps_samples_and_epochs_are_counted() -> None:
    order = DataOrder(num_samples=20, global_batch=6, seed=0)
    assert order.steps_per_epoch == 4
    assert order.num_steps(epochs=3, steps=None) == 12
    assert order.num_steps(epochs=None, steps=5) == 5
    assert [order.epoch(step) for step in (0, 3, 4)] == [0, 0, 1]
    assert [order.samples_before(step) for step in (0, 3, 4, 5)] == [0, 18, 20, 26]
    assert len(order.batch(3)) == 2


@given(st.integers(1, 100), st.integers(1, 20))
def test_micro_batches_differ_by_one_at_most(num_samples: int, micro_batch: int) -> None:
    sizes = [len(part) for part in micro_batches(np.arange(num_samples), micro_batch)]
    assert max(sizes) <= micro_batch
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-num_samples // micro_batch)


class Plain:
    """A dataset of numbers without the method that fetches several at once."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index


class Batched(Plain):
    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("dataset", [Plain(), Batched()])
def test_samples_are_stacked(dataset: Plain) -> None:
    inputs, target = fetch(dataset, np.array([4, 1]))
    assert inputs.tolist() == [[4.0], [1.0]]
    assert target.tolist() == [4, 1]


def test_consecutive_batches_cover_a_slice() -> None:
    batches = list(consecutive(Plain(), 2, slice(1, 4)))
    assert [target.tolist() for _, target in batches] == [[1, 2], [3]]


@pytest.mark.parametrize("dataset", [iter([1]), []])
def test_data_without_length_or_samples_are_refused(dataset: object) -> None:
    with pytest.raises(ConfigError, match="training data"):
        check_map_style(dataset, "training")


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_a_stream_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"are a Stream, .*cannot be asked for the samples of a step again; read it"):
        check_map_style(Stream(), "training")

"""Byte windows over the standard library's help topics."""

import math

import pytest
import torch
from torch.utils.data import default_collate

from revdist.errors import ConfigError
from revdist.training.text import NUM_BYTES, bits_per_byte, pydoc_text


def test_the_target_is_one_byte_ahead_of_the_input() -> None:
    train, test = pydoc_text(length=64)
    for dataset in (train, test):
        input_T, target_T = dataset[len(dataset) - 1]
        assert input_T.shape == target_T.shape == (64,)
        assert input_T.dtype == torch.int64
        torch.testing.assert_close(input_T[1:], target_T[:-1], rtol=0, atol=0)


def test_windows_cover_the_text_without_a_gap_and_keep_the_test_text_apart() -> None:
    train, test = pydoc_text(length=100)
    pieces = [bytes(train[i][0].to(torch.uint8).tolist()) for i in range(len(train))]
    assert b"".join(pieces) == train.text[: 100 * len(train)].tobytes()
    assert len(train.text) > 8 * len(test.text) > 0


def test_overlapping_windows_are_a_matter_of_stride() -> None:
    dense, _ = pydoc_text(length=64, stride=16)
    sparse, _ = pydoc_text(length=64)
    torch.testing.assert_close(dense[4][0], sparse[1][0], rtol=0, atol=0)


def test_uniform_logits_cost_eight_bits_a_byte() -> None:
    train, _ = pydoc_text(length=32)
    _, target_BT = default_collate([train[0], train[1]])
    logits_BVT = torch.zeros(2, NUM_BYTES, 32)
    assert float(bits_per_byte(logits_BVT, target_BT)) == pytest.approx(16)
    assert float(bits_per_byte(logits_BVT, target_BT, "mean")) == pytest.approx(8)
    assert bits_per_byte(logits_BVT, target_BT, "none").shape == (2,)


@pytest.mark.parametrize("sizes", [{"length": 0}, {"stride": 0}, {"test_fraction": 1.0}, {"length": 10**7}])
def test_sizes_that_give_no_window_are_refused(sizes: dict) -> None:
    with pytest.raises(ConfigError, match="pydoc_text"):
        pydoc_text(**sizes)


def test_an_index_past_the_end_is_an_index_error() -> None:
    train, _ = pydoc_text(length=64)
    with pytest.raises(IndexError, match=str(len(train))):
        train[len(train)]


def test_bits_follow_the_natural_logarithm_of_torch() -> None:
    logits_BVT = torch.randn(3, NUM_BYTES, 5)
    target_BT = torch.randint(NUM_BYTES, (3, 5))
    nats = torch.nn.functional.cross_entropy(logits_BVT, target_BT, reduction="mean")
    assert float(bits_per_byte(logits_BVT, target_BT, "mean")) == pytest.approx(float(nats) / math.log(2), rel=1e-5)

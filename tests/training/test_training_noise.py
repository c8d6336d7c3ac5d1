"""Noise images: the same whenever asked for, and of the shape asked for."""

from __future__ import annotations

import pytest
import torch

from revdist.errors import ConfigError
from revdist.training.noise import noise_images


def test_a_sample_is_the_same_each_time() -> None:
    train, test = noise_images(size=8, channels=2, num_classes=3, num_samples=5)
    assert test is None
    assert len(train) == 5
    image, label = train[4]
    assert image.shape == (2, 8, 8)
    assert label == 1
    assert torch.equal(image, train[4][0])
    assert not torch.equal(image, train[3][0])
    with pytest.raises(IndexError):
        train[5]


def test_it_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    train, _ = noise_images(size=8)
    train[0]
    assert torch.equal(before, torch.get_rng_state())


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="size 0 must be at least 1"):
        noise_images(size=0)

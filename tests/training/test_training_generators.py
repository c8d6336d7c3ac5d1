"""What code outside of steps draws at random goes on where it stopped."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from revdist.errors import CheckpointError
from revdist.training.generators import generator_states, restore_generators


def draw() -> list[float]:
    """From each generator, the normal distribution's second value included, which some of them keep in hand."""
    return [random.gauss(0, 1), random.random(), float(np.random.normal()), float(np.random.rand()), *torch.randn(3)]


def test_the_draws_go_on_where_they_stopped() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()
    saved = json.dumps(generator_states())
    after = draw()
    draw()
    restore_generators(saved)
    assert draw() == after


@pytest.mark.parametrize("text", ["", "{}", '{"python": [3, [1], null]}'])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="not the state of random number generators"):
        restore_generators(text)

"""What is done about a loss that is not finite, decided by every rank from the same rows and so alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from revdist.errors import NonFiniteLoss
from revdist.training.data import Indices, slice_of
from revdist.training.row import Row

MOST_IN_A_ROW = 10
"""Steps left out one after another before the run is stopped: by then it is the weights, not the samples."""

_REMEDY = "lower the learning rate, set optimizer.clip_norm, or look at these samples"


def non_finite_losses(rows: Sequence[Row], batch: Indices, shares: Sequence[int], *, step: int) -> list[NonFiniteLoss]:
    """An error for every rank whose loss is not finite, with `step`, `rank` and `samples`; not raised here.

    batch: indices of the step's samples; shares: per rank
    """
    errors = []
    for rank, row in enumerate(rows):
        if row.failed or math.isfinite(row.loss_sum):
            continue
        samples = batch[slice_of(shares, rank, len(batch))].tolist()
        errors.append(
            NonFiniteLoss(
                f"the loss of step {step} is {row.loss_sum} on rank {rank}, samples {_abbreviate(samples)}: {_REMEDY}",
                step=step,
                rank=rank,
                samples=samples,
            )
        )
    return errors


@final
class Tolerance:
    """Whether a step with such a loss is left out or ends the run."""

    def __init__(self, policy: str) -> None:
        """policy: `stop` or `skip`."""
        self._policy = policy
        self._in_a_row = 0

    def bear(self, errors: Sequence[NonFiniteLoss]) -> bool:
        """Whether the step is to be left out: False where there is no error. Raises the first where it is too much."""
        if not errors:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        first = errors[0]
        if self._policy == "stop":
            raise first
        if self._in_a_row > MOST_IN_A_ROW:
            raise NonFiniteLoss(
                f"{first.message}; so were the {MOST_IN_A_ROW} steps before, which were left out", **first.facts
            )
        return True


def _abbreviate(samples: Sequence[int]) -> str:
    shown = ", ".join(str(sample) for sample in samples[:8])
    return f"{shown} and {len(samples) - 8} more" if len(samples) > 8 else shown

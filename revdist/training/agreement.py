"""What the ranks agree on once a step, in one tiny collective.

Every rank contributes one row and receives all of them. Everything that all ranks must do alike is
then a pure function of the same rows: whether the step counts or is redone, which generation of
shares holds next, whether the run stops here. The rows are also the step's metrics, so each rank
knows them all and any survivor can report them.

A rank hands its row in as soon as its gradients are on their way, so that rows travel beside them. Rows are
gathered, not summed: gathering needs no answer from a peer whose row has come already, so the last rank to finish
a step does not wait once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist

from revdist.training.row import Row, Stage


@final
class Agreement:
    """An exchange of rows under way over a CPU group. Every rank begins one, then asks for the rows."""

    def __init__(self, row: Row, group: dist.ProcessGroup) -> None:
        own = torch.tensor([row.numbers()], dtype=torch.float64)
        self._table = own.new_empty(dist.get_world_size(group), own.shape[1])
        self._work = dist.all_gather_into_tensor(self._table, own, group=group, async_op=True)

    def rows(self) -> list[Row]:
        """One per rank, in rank order, once all are there. Raises where a peer is lost."""
        self._work.wait()
        return [Row.from_numbers(numbers) for numbers in self._table.tolist()]


def must_redo(rows: Sequence[Row]) -> bool:
    """Whether a rank could not finish the step, so that none may take it."""
    return any(row.failed for row in rows)


def must_stop(rows: Sequence[Row]) -> bool:
    """Whether a rank was asked to leave: all stop at the same step."""
    return any(row.stop for row in rows)


def must_save(rows: Sequence[Row]) -> bool:
    """Whether it is time for a checkpoint by some rank's clock: all save at the same step."""
    return any(row.save for row in rows)


def next_generation(rows: Sequence[Row]) -> int:
    """The generation of the next step: the newest that every rank has received."""
    return min(row.newest_generation for row in rows)


def next_group(rows: Sequence[Row]) -> int:
    """The newest group that every rank is ready to change to."""
    return min(row.newest_group for row in rows)


def must_pool(rows: Sequence[Row]) -> bool:
    """Whether all ranks exchange profiles now: some were measured since the start, and none is to come."""
    stages = [row.profile_stage for row in rows]
    return Stage.MEASURING not in stages and Stage.MEASURED in stages


def mean_loss(rows: Sequence[Row]) -> float:
    """Mean loss per sample of the whole batch."""
    return sum(row.loss_sum for row in rows) / max(1, sum(row.samples for row in rows))

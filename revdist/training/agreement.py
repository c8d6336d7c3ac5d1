"""What the ranks agree on once a step, in one tiny collective.

Every rank contributes one row and receives all of them. Everything that all ranks must do alike is
then a pure function of the same rows: whether the step counts or is redone, which generation of
shares holds next, whether the run stops here. The rows are also the step's metrics, so each rank
knows them all and any survivor can report them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rank's word on one step. All numbers survive the trip as float64, so integers stay below 2**53."""

    samples: int = 0
    loss_sum: float = 0.0
    failed: bool = False
    """Out of memory after reduction began: the step must be redone by all."""
    stop: bool = False
    """This rank was asked to save and leave."""
    newest_generation: int = 0
    """Newest generation of shares this rank has received."""
    generation: int = 0
    """Generation this step ran under."""
    share: int = 0
    micro_batch: int = 0
    step_s: float = 0.0
    """Duration of the step before this one, waiting for peers included."""
    compute_s: float = 0.0
    """Own forward and backward time of this step, waiting for peers excluded."""
    peak_bytes: int = 0
    predicted_peak_bytes: int = 0
    predicted_step_s: float = 0.0
    budget_bytes: int = 0
    free_bytes: int = 0
    demoted_bytes: int = 0
    """Cached activations given up during the step because memory had vanished."""

    def numbers(self) -> list[float]:
        return [float(getattr(self, field.name)) for field in _FIELDS]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Self:
        return cls(**{field.name: _CASTS[str(field.type)](n) for field, n in zip(_FIELDS, numbers, strict=True)})


_FIELDS = dataclasses.fields(Row)
_CASTS = {"int": int, "float": float, "bool": bool}


def agree(row: Row, group: dist.ProcessGroup) -> list[Row]:
    """Exchange rows over a CPU group: one per rank, in rank order."""
    table = torch.zeros(dist.get_world_size(group), len(_FIELDS), dtype=torch.float64)
    table[dist.get_rank(group)] = torch.tensor(row.numbers(), dtype=torch.float64)
    dist.all_reduce(table, group=group)  # the other rows are zero, so the sum is every rank's own row
    return [Row.from_numbers(numbers) for numbers in table.tolist()]


def must_redo(rows: Sequence[Row]) -> bool:
    """Whether a rank could not finish the step, so that none may take it."""
    return any(row.failed for row in rows)


def must_stop(rows: Sequence[Row]) -> bool:
    """Whether a rank was asked to leave: all stop at the same step."""
    return any(row.stop for row in rows)


def next_generation(rows: Sequence[Row]) -> int:
    """The generation of the next step: the newest that every rank has received."""
    return min(row.newest_generation for row in rows)


def mean_loss(rows: Sequence[Row]) -> float:
    """Mean loss per sample of the whole batch."""
    return sum(row.loss_sum for row in rows) / max(1, sum(row.samples for row in rows))

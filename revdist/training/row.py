"""One rank's word on one step."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Self


class Stage(enum.IntEnum):
    """How far a rank is with its profile."""

    KNOWN = 0
    """It has been exchanged with the others."""
    MEASURED = 1
    MEASURING = 2
    """One micro-batch size after another, between steps."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rank's word on one step. All numbers survive the trip as float64, so integers stay below 2**53."""

    samples: int = 0
    loss_sum: float = 0.0
    failed: bool = False
    """Out of memory after reduction began: the step must be redone by all."""
    stop: bool = False
    """This rank was asked to save and leave."""
    save: bool = False
    """It is time for a checkpoint, by this rank's clock."""
    newest_generation: int = 0
    """Newest generation of shares this rank has received."""
    newest_group: int = 0
    """Number of the newest group ordered that this rank is ready to change to."""
    profile_stage: int = 0
    """How far this rank is with a profile that it started without: a `Stage`."""
    generation: int = 0
    """Generation this step ran under."""
    share: int = 0
    micro_batch: int = 0
    step_s: float = 0.0
    """Time of this step until own gradients were on their way, attempts that ran out of memory included."""
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

"""The situations two devices are put in, and the training that all ways do in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from revdist.training.datasets import digits

MIB = 2**20
GLOBAL_BATCH = 64
"""Samples a step, unless another number is asked for: a step then takes some 80 ms where nobody disturbs."""
MODEL = "revdist.models:revnet_digits"
DATA = "benchmarks.unequal.cases:digits_in_whole_batches"
OPTIMIZER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "fused": True}
ROOMY_BYTES = 256 * MIB
TIGHT_BYTES = 10 * MIB
"""Holds about a quarter of what an equal share of 64 samples keeps for its backward."""


def digits_in_whole_batches(batch: int) -> tuple[Any, Any]:
    """As many digits as make steps of `batch` samples, so that every step of an epoch has as many as the next."""
    train, test = digits()
    return torch.utils.data.Subset(train, range(len(train) // batch * batch)), test


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Two CPU devices; replica i runs on core i alone."""

    key: str
    title: str
    capacities: tuple[int, int] = (ROOMY_BYTES, ROOMY_BYTES)
    neighbour: bool = False
    """Whether another process is busy on the second core all the time."""
    taken: float = 0.0
    """Part of the second device's memory that another process takes for the middle third of the rounds."""
    goal: float | None = None
    """Least throughput as part of the sum of the devices alone; None: judged otherwise."""

    @property
    def smallest_capacities(self) -> tuple[int, int]:
        """What is left of each device at the worst moment: what a fixed plan has to live with."""
        first, second = self.capacities
        return first, int(second * (1 - self.taken))


CASES = (
    Case(key="equal", title="equal devices"),
    Case(key="a", title="(a) unequal memory", capacities=(ROOMY_BYTES, TIGHT_BYTES), goal=0.95),
    Case(key="b", title="(b) a busy neighbour on one core", neighbour=True, goal=0.95),
    Case(key="c", title="(c) both", capacities=(ROOMY_BYTES, TIGHT_BYTES), neighbour=True, goal=0.95),
    Case(key="d", title="(d) memory that changes during the run", capacities=(ROOMY_BYTES, 40 * MIB), taken=0.75),
)

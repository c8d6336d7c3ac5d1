"""Where the time of steps that devices take together goes: what waiting has which cause."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One step of all ranks."""

    step_s: float
    shares: tuple[int, ...]
    compute_s: tuple[float, ...]
    """Of each rank's own work."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """record: a line of metrics.jsonl."""
        ranks = record["ranks"]
        return cls(
            step_s=record["step_s"],
            shares=tuple(rank["share"] for rank in ranks),
            compute_s=tuple(rank["compute_s"] for rank in ranks),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Parts of the mean step. With `at_work` they add up to one."""

    at_work: float
    """What the steps would take if every device computed at its mean speed and never waited."""
    unequal: float
    """Waiting because shares are not in proportion to mean speeds: the planner's to avoid."""
    varying: float
    """Waiting because a device is faster in one step and slower in the next: no fixed shares avoid it."""
    exchange: float
    """From the slowest rank's last gradient to the end: the rest of the reduction, the optimizer, reports."""

    @classmethod
    def of(cls, steps: Sequence[StepTimes]) -> Self:
        """steps: at least one, each with shares of the same global batch."""
        num_ranks = len(steps[0].shares)
        sample_s = [statistics.fmean(each.compute_s[rank] / each.shares[rank] for each in steps)
                    for rank in range(num_ranks)]  # fmt: skip
        whole_s = statistics.fmean(each.step_s for each in steps)
        slowest_s = statistics.fmean(max(each.compute_s) for each in steps)
        steady_s = statistics.fmean(
            max(seconds * share for seconds, share in zip(sample_s, each.shares, strict=True)) for each in steps
        )
        work_s = sum(steps[0].shares) / sum(1 / seconds for seconds in sample_s)
        return cls(
            at_work=work_s / whole_s,
            unequal=(steady_s - work_s) / whole_s,
            varying=(slowest_s - steady_s) / whole_s,
            exchange=(whole_s - slowest_s) / whole_s,
        )

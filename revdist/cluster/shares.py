"""How the global batch is divided, and when that changes. Curves and times in, shares out."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import final

from revdist.config import RunConfig
from revdist.planning.batch import StepTimeCurve
from revdist.planning.policy import resplit
from revdist.planning.split import equal_split, slowest_s, split
from revdist.training.orders import Shares
from revdist.training.reports import CurveReport
from revdist.training.row import Row

_WINDOW = 16
"""Steps under unchanged plans after which measured times may change the shares."""
_LEAST_S = 1e-9
"""No step is faster: keeps ratios finite for models too small to be timed."""


@final
class ShareKeeper:
    """Keeps every rank's curve and the shares in force."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self._config = config
        self._world_size = world_size
        self._curves: dict[int, StepTimeCurve] = {}
        self._inverted: dict[int, StepTimeCurve] = {}
        self._factors = [1.0] * world_size
        self._times: list[deque[float]] = [deque(maxlen=_WINDOW) for _ in range(world_size)]
        self.shares: Shares | None = None
        """None before every rank's first curve."""

    def take_curve(self, report: CurveReport) -> Shares | None:
        """A rank can start, or its memory has changed: the first shares, or new ones where they are worth a change.

        The first shares wait for every rank, but not for the solver: they are equal, unless they can never change.
        """
        self._curves[report.rank] = report.curve
        if report.inverted is not None:
            self._inverted[report.rank] = report.inverted
        self._forget_times()
        if len(self._curves) < self._world_size:
            return None
        if self.shares is None:
            first = equal_split(self._config.global_batch, self._world_size) if self._may_change else self._best()
            return self._publish(first, reason="start")
        if not self._may_change or not self._all_solved:
            return None
        best, now = self._best(), self.shares.by_rank
        gain = 1 - slowest_s(self._corrected(), best) / slowest_s(self._corrected(), now)
        if best == now or gain < self._config.replan.min_change:
            return None
        return self._publish(best, reason="share")

    def take_rows(self, rows: Sequence[Row]) -> Shares | None:
        """A step is done: new shares if measured times have called for them throughout a window."""
        assert self.shares is not None
        if (
            not self._may_change
            or not self._all_solved
            or any(row.generation != self.shares.generation for row in rows)
        ):
            return None
        for times, row in zip(self._times, rows, strict=True):
            times.append(row.compute_s)
        if len(self._times[0]) < _WINDOW:
            return None
        better = resplit(
            self._in_order(self._curves),
            self.shares.by_rank,
            [list(times) for times in self._times],
            min_gain=max(0.05, self._config.replan.min_change),
            window=_WINDOW,
        )
        self._forget_times()
        if better is None:
            return None
        self._factors = list(better.factors)
        return self._publish(better.shares, reason="share")

    def gains(self) -> dict[str, float | str]:
        """What the shares and schedules in force gain, as ratios of predicted step times.

        Empty where the run ended before every rank's plan was the solver's.
        """
        if self.shares is None or not self._all_solved:
            return {}
        curves, inverted = self._in_order(self._curves), self._in_order(self._inverted)
        planned_s = max(slowest_s(curves, self.shares.by_rank), _LEAST_S)
        equal = equal_split(self._config.global_batch, self._world_size)
        inverted_s = slowest_s(inverted, split(inverted, self._config.global_batch))
        return {
            "over_all_invert": max(inverted_s, _LEAST_S) / planned_s,
            "over_equal_split": max(slowest_s(curves, equal), _LEAST_S) / planned_s,
            "basis": "step times predicted from the profiles measured on these devices, at their last budgets",
        }

    @property
    def _all_solved(self) -> bool:
        """Whether every rank's curve is the solver's, not that of a first plan."""
        return len(self._inverted) == self._world_size

    @property
    def _may_change(self) -> bool:
        return self._config.replan.shares and self._config.planning.share == "auto" and self._world_size > 1

    def _best(self) -> tuple[int, ...]:
        if self._config.planning.share == "equal":
            return equal_split(self._config.global_batch, self._world_size)
        return split(self._corrected(), self._config.global_batch)

    def _corrected(self) -> list[StepTimeCurve]:
        """Curves as measured steps say they are: a profile cannot know of a neighbour that came later."""
        curves = self._in_order(self._curves)
        return [curve.scaled(factor) for curve, factor in zip(curves, self._factors, strict=True)]

    def _publish(self, by_rank: tuple[int, ...], *, reason: str) -> Shares:
        generation = 0 if self.shares is None else self.shares.generation + 1
        self.shares = Shares(generation=generation, by_rank=by_rank, reason=reason)
        self._forget_times()
        return self.shares

    def _forget_times(self) -> None:
        for times in self._times:
            times.clear()

    def _in_order(self, curves: dict[int, StepTimeCurve]) -> list[StepTimeCurve]:
        return [curves[rank] for rank in range(self._world_size)]

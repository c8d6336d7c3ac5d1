"""How the global batch is divided, and when that changes. Curves and times in, shares out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from revdist.config import RunConfig
from revdist.planning.batch import StepTimeCurve
from revdist.planning.policy import resplit
from revdist.planning.split import equal_split, slowest_s, split
from revdist.training.orders import Shares
from revdist.training.reports import CurveReport
from revdist.training.row import Row

_WINDOW = 16
"""Fewest steps under unchanged plans after which measured times may change the shares."""
_MOST_STEPS = 64
"""Of a window that are looked at, the latest: steps may be short and replicas many."""
_LOOKS_BACK = (16, 8, 4, 2, 1)
"""Windows: a device that has just become slow shows in the last, a small difference in many. What new shares must have
saved in all of them together is the same."""
_LEAST_S = 1e-9
"""No step is faster: keeps ratios finite for models too small to be timed."""


@final
class ShareKeeper:
    """Keeps every member's curve and the shares in force, which are those of the members of the group."""

    def __init__(self, config: RunConfig, members: Sequence[int]) -> None:
        """members: of the first group, in rank order."""
        self._config = config
        self._members = tuple(members)
        self._curves: dict[int, StepTimeCurve] = {}
        self._inverted: dict[int, StepTimeCurve] = {}
        self._factors: dict[int, float] = {}
        self._known: dict[StepTimeCurve, StepTimeCurve] = {}
        self._steps_s: deque[list[float]] = deque(maxlen=_MOST_STEPS)
        """Of the window under way: every member's time, step by step."""
        self._window_s = 0.0
        """Of the window under way."""
        self._windows: deque[npt.NDArray[np.float64]] = deque(maxlen=max(_LOOKS_BACK))
        """The last ones under the same plans, (steps, members)."""
        self._num_windows = 0
        """Under the same plans."""
        self.shares: Shares | None = None
        """None before every member's first curve."""

    def take_curve(self, member: int, report: CurveReport) -> Shares | None:
        """A member can start, or its memory has changed: the first shares, or new ones where they are worth a change.

        The first shares wait for every member, but not for the solver: they are equal, unless they can never change.
        """
        self._keep(member, report)
        if member not in self._members:
            return None
        self._forget_times()
        if any(one not in self._curves for one in self._members):
            return None
        if self.shares is None:
            return self._publish(self._equal() if self._may_change else self._best(), reason="start")
        if not self._may_change or not self._all_solved or not self._all_measured:
            return None
        best, now, curves = self._best(), self.shares.by_rank, self._corrected(self._curves)
        gain = 1 - slowest_s(curves, best) / slowest_s(curves, now)
        if best == now or gain < self._config.replan.min_change:
            return None
        return self._publish(best, reason="share")

    def take_over(self, shares: Shares, curves: Mapping[int, CurveReport]) -> None:
        """Go on from what another keeper published. curves: the last that each member reported."""
        self.shares = shares
        for member, report in curves.items():
            self._keep(member, report)

    def regroup(self, members: Sequence[int], *, reason: str) -> Shares:
        """Shares of another group, in the order of its ranks. Every member's curve is known."""
        self._members = tuple(members)
        return self._publish(self._best() if self._may_change else self._equal(), reason=reason)

    def take_rows(self, rows: Sequence[Row]) -> Shares | None:
        """A step is done: new shares if the measured ones call for them by now."""
        assert self.shares is not None
        if (
            not self._may_change
            or not self._all_solved
            or any(row.generation != self.shares.generation for row in rows)
        ):
            return None
        self._steps_s.append([row.compute_s for row in rows])
        self._window_s += max(self._steps_s[-1])
        # Sixteen steps of milliseconds do not tell a slow device from a busy moment.
        if len(self._steps_s) < _WINDOW or self._window_s < self._config.replan.settle_s:
            return None
        self._windows.append(np.array(self._steps_s))
        self._num_windows += 1
        self._begin_window()
        count = next(count for count in _LOOKS_BACK if self._num_windows % count == 0)
        better = resplit(
            self._in_order(self._curves),
            self.shares.by_rank,
            np.concatenate(list(self._windows)[-count:]),
            min_gain=self._config.replan.min_change / count,
        )
        if better is None:
            return None
        self._factors.update(zip(self._members, better.factors, strict=True))
        return self._publish(better.shares, reason="share")

    def gains(self) -> dict[str, float | str]:
        """What the shares and schedules in force gain, as ratios of predicted step times.

        Empty where the run ended before every rank's plan was the solver's.
        """
        if self.shares is None or not self._all_solved:
            return {}
        curves, inverted = self._corrected(self._curves), self._corrected(self._inverted)
        planned_s = max(slowest_s(curves, self.shares.by_rank), _LEAST_S)
        equal = self._equal()
        inverted_s = slowest_s(inverted, split(inverted, self._config.global_batch))
        return {
            "over_all_invert": max(inverted_s, _LEAST_S) / planned_s,
            "over_equal_split": max(slowest_s(curves, equal), _LEAST_S) / planned_s,
            "basis": "step times predicted from the profiles measured on these devices, at their last budgets"
            + (", and corrected by measured steps" if self._factors else ""),
        }

    @property
    def _all_solved(self) -> bool:
        """Whether every member's curve is the solver's, not that of a first plan."""
        return all(member in self._inverted for member in self._members)

    @property
    def _all_measured(self) -> bool:
        """Whether there are times to compare: a model that was never seen starts without, and one may be too small
        to be timed."""
        return all(self._curves[member].step_s(1) > 0 for member in self._members)

    @property
    def _may_change(self) -> bool:
        return self._config.replan.shares and self._config.planning.share == "auto" and len(self._members) > 1

    def _best(self) -> tuple[int, ...]:
        if self._config.planning.share == "equal" or not self._all_measured:
            return self._equal()
        return split(self._corrected(self._curves), self._config.global_batch)

    def _equal(self) -> tuple[int, ...]:
        return equal_split(self._config.global_batch, len(self._members))

    def _corrected(self, curves: Mapping[int, StepTimeCurve]) -> list[StepTimeCurve]:
        """Curves as measured steps say they are: a profile cannot know of a neighbour that came later."""
        corrected: dict[tuple[int, float], StepTimeCurve] = {}
        for member in self._members:
            curve, factor = curves[member], self._factors.get(member, 1.0)
            if (id(curve), factor) not in corrected:
                corrected[id(curve), factor] = curve if factor == 1.0 else curve.scaled(factor)
        return [corrected[id(curves[member]), self._factors.get(member, 1.0)] for member in self._members]

    def _forget_times(self) -> None:
        self._begin_window()
        self._windows.clear()
        self._num_windows = 0

    def _begin_window(self) -> None:
        self._steps_s.clear()
        self._window_s = 0.0

    def _keep(self, member: int, report: CurveReport) -> None:
        """Take a member's curves. Equal ones are kept as one object, which the split counts as one."""
        if len(self._known) > 2 * (len(self._curves) + len(self._inverted)):  # they come by the thousand in days
            self._known = {curve: curve for curve in [*self._curves.values(), *self._inverted.values()]}
        self._curves[member] = self._known.setdefault(report.curve, report.curve)
        if report.inverted is not None:
            self._inverted[member] = self._known.setdefault(report.inverted, report.inverted)

    def _publish(self, by_rank: tuple[int, ...], *, reason: str) -> Shares:
        generation = 0 if self.shares is None else self.shares.generation + 1
        self.shares = Shares(generation=generation, by_rank=by_rank, reason=reason)
        self._forget_times()
        return self.shares

    def _in_order(self, curves: dict[int, StepTimeCurve]) -> list[StepTimeCurve]:
        return [curves[member] for member in self._members]

"""This replica's planning: from its device's budget to the plan it runs, a look-up away.

The control thread asks for a new curve when memory changes, the training thread for a plan at a step
boundary; a lock keeps the two apart.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import final

import torch

from revdist.config import RunConfig
from revdist.errors import BudgetTooSmall, OutOfDeviceMemory, format_bytes
from revdist.planning.accuracy import bounded, not_to_be_inverted
from revdist.planning.batch import StepTimeCurve, step_time_curve
from revdist.planning.costs import Mode, Option, Plan, Profile
from revdist.training.first_plan import first_curve, unprofiled_curve

_GIVE_WAY = 0.9
"""A plan that did not fit is followed by one that needs this part of its memory at most."""


@final
class LocalPlanner:
    """Plans of one device at any budget."""

    def __init__(
        self,
        config: RunConfig,
        profiles: Sequence[Profile],
        *,
        device: str,
        device_name: str = "",
        fixed_bytes: int,
        step_peak_bytes: int,
        options: Sequence[tuple[Mode, ...]] = (),
        first_micro_batch: int = 1,
    ) -> None:
        """profiles: none where the model is yet to be measured: see `learn`.
        fixed_bytes: of the device, whatever the plan.
        step_peak_bytes: most bytes needed between two backwards, on top of `fixed_bytes`: no plan changes them.
        options, first_micro_batch: the modes of every operator, and the micro-batch to start with, for a planner
        without profiles.

        Raises AccuracyUnreachable where every plan would be less accurate than is asked for.
        """
        self._config = config
        self.fixed_bytes = fixed_bytes
        """Bytes of the device that no plan changes."""
        self._step_peak_bytes = step_peak_bytes
        self._options = [_offered(modes, config) for modes in options]
        self._first_micro_batch = first_micro_batch
        self._profiles: list[Profile] = []
        self._device = device
        self._device_name = device_name or device
        self._lock = threading.Lock()
        self._curve: StepTimeCurve | None = None
        self._mistrust_bytes = 0
        self.version = 0
        """Counts changes of the curve."""
        self.reason = "start"
        """Why it changed last."""
        self.learn(profiles)

    def learn(self, profiles: Sequence[Profile]) -> None:
        """Plan with these profiles from the next curve on.

        Raises AccuracyUnreachable where every plan would be less accurate than is asked for.
        """
        with self._lock:
            self._profiles = [
                dataclasses.replace(
                    _allowed(profile, self._config),
                    fixed_bytes=self.fixed_bytes,
                    step_peak_bytes=self._step_peak_bytes,
                )
                for profile in accurate(profiles, self._config)
            ]

    @property
    def has_profiles(self) -> bool:
        return bool(self._profiles)

    @property
    def never_inverted(self) -> frozenset[int]:
        """Operators that must not be inverted for accuracy, also when memory is short; empty without a limit."""
        if self._config.planning.max_reconstruction_error is None:
            return frozenset()
        if not self._profiles:
            return frozenset(range(len(self._options)))
        return not_to_be_inverted(self._profiles[0])

    @property
    def curve(self) -> StepTimeCurve:
        assert self._curve is not None, "replan first"
        return self._curve

    @property
    def budget_bytes(self) -> int:
        """The budget that plans are made for."""
        return self.curve.budget_bytes

    @functools.cached_property
    def minimum_bytes(self) -> int:
        """The least budget for which there is a plan."""
        try:
            self._solve(self._profiles, 0)
        except BudgetTooSmall as error:
            return max(self._step_peak_bytes, error.minimum_bytes)
        return self._step_peak_bytes

    def start(self, budget_bytes: int, *, reason: str = "start") -> StepTimeCurve:
        """The first curve, which waits neither for a profile nor, where a simple schedule fits, for the solver.

        Raises BudgetTooSmall where it is known that no plan fits.
        """
        if not self._profiles:
            return self._set(self._unprofiled(budget_bytes, self._first_micro_batch), reason)
        curve = first_curve(
            self._profiles, budget_bytes, micro_batch=self._config.micro_batch, max_share=self._config.global_batch
        )
        if curve is not None:
            return self._set(curve, reason)
        if budget_bytes < self.minimum_bytes:
            raise BudgetTooSmall(budget_bytes, self.minimum_bytes, where=self._device_name, remedy=self._remedy)
        return self.replan(budget_bytes, reason=reason)

    def replan(self, budget_bytes: int, *, reason: str) -> StepTimeCurve:
        """Plan for another budget from now on, or for the smallest that any plan needs if it is below that.

        Then memory may run out, but not for want of trying.
        """
        with self._lock:
            budget = max(self.minimum_bytes, budget_bytes - self._mistrust_bytes)
            return self._set(self._solve(self._profiles, budget), reason)

    def give_way(self, plan: Plan, budget_bytes: int) -> StepTimeCurve:
        """Plan for clearly less than a plan that ran out of memory needs.

        Where the device's reading, `budget_bytes`, says that it should have fitted, what the reading
        promises too much is held against it for the rest of the run.
        Raises BudgetTooSmall where the plan was the smallest there is, OutOfDeviceMemory where that should have fitted,
        and torch.OutOfMemoryError where a model without a profile does not even fit sample by sample.
        """
        with self._lock:
            if not self._profiles:
                if plan.micro_batch == 1 or self._config.micro_batch is not None:
                    raise torch.OutOfMemoryError(f"{self._device_name} has no room for a micro-batch of one")
                return self._set(self._unprofiled(budget_bytes, plan.micro_batch // 2), "memory-lost")
            if plan.schedule.need_bytes <= self.minimum_bytes:
                if budget_bytes < self.minimum_bytes:
                    raise BudgetTooSmall(budget_bytes, self.minimum_bytes, where=self._device_name, remedy=self._remedy)
                raise OutOfDeviceMemory(
                    f"{self._device_name} ran out of memory under the smallest plan, which needs "
                    f"{format_bytes(self.minimum_bytes)} of the {format_bytes(budget_bytes)} that were free for it; "
                    f"{self._remedy}",
                    budget_bytes=budget_bytes,
                    minimum_bytes=self.minimum_bytes,
                )
            target = min(budget_bytes - self._mistrust_bytes, int(plan.schedule.need_bytes * _GIVE_WAY))
            curve = self._set(self._solve(self._profiles, max(self.minimum_bytes, target)), "memory-lost")
            self._mistrust_bytes = max(self._mistrust_bytes, budget_bytes - curve.budget_bytes)
            return curve

    def plan(self, share: int, *, rank: int, generation: int, reason: str) -> Plan:
        """How to run a share under the present curve."""
        with self._lock:
            curve = self.curve
        choice = curve.choice(share)
        need = max(choice.schedule.need_bytes, self._step_peak_bytes)
        return Plan(
            generation=generation,
            rank=rank,
            device=self._device,
            share=share,
            micro_batch=choice.micro_batch,
            accumulation_steps=choice.accumulation_steps,
            schedule=choice.schedule,
            budget_bytes=curve.budget_bytes,
            predicted_step_s=choice.step_s,
            predicted_peak_bytes=self.fixed_bytes + need,
            reason=reason,
        )

    def inverted_curve(self) -> StepTimeCurve:
        """The curve of the present budget with INVERT wherever it exists, to compare with.

        What does not fit with INVERT fits with nothing else, unless RECOMPUTE is thriftier somewhere:
        then its smallest plan stands for it.
        """
        inverted = [_only(profile, Mode.INVERT) for profile in self._profiles]
        try:
            return self._solve(inverted, self.budget_bytes)
        except BudgetTooSmall as error:
            return self._solve(inverted, error.minimum_bytes)

    @property
    def _remedy(self) -> str:
        fixed = f"parameters, gradients and optimizer state take {format_bytes(self.fixed_bytes)} besides"
        if self._config.micro_batch is None:
            return f"give the device that much more; {fixed}"
        return f"lower micro_batch, or give the device that much more; {fixed}"

    def _unprofiled(self, budget_bytes: int, micro_batch: int) -> StepTimeCurve:
        return unprofiled_curve(
            self._options,
            budget_bytes,
            micro_batch=micro_batch,
            max_share=self._config.global_batch,
            exact=self._config.planning.max_reconstruction_error is not None,
        )

    def _set(self, curve: StepTimeCurve, reason: str) -> StepTimeCurve:
        self._curve = curve
        self.version += 1
        self.reason = reason
        return curve

    def _solve(self, profiles: Sequence[Profile], budget_bytes: int) -> StepTimeCurve:
        fixed = () if self._config.micro_batch is None else (self._config.micro_batch,)
        return step_time_curve(
            profiles,
            budget_bytes,
            max_share=self._config.global_batch,
            micro_batches=fixed,
            guarantee=self._config.planning.guarantee,
        )


def accurate(profiles: Sequence[Profile], config: RunConfig) -> Sequence[Profile]:
    """The profiles with those options alone that are as accurate as the configuration asks for.

    Raises AccuracyUnreachable where an operator has none.
    """
    limit = config.planning.max_reconstruction_error
    return profiles if limit is None else bounded(profiles, limit)


def _allowed(profile: Profile, config: RunConfig) -> Profile:
    """The profile with the modes that the configuration lets the planner choose from."""
    if config.planning.schedule == "auto":
        return profile
    return _only(profile, Mode.SAVE if config.planning.schedule == "save" else Mode.INVERT)


def _offered(modes: tuple[Mode, ...], config: RunConfig) -> tuple[Mode, ...]:
    """The modes of an operator that the configuration allows."""
    if config.planning.schedule == "auto":
        wanted = tuple(Mode(mode) for mode in config.planning.modes)
    else:
        wanted = (Mode.SAVE if config.planning.schedule == "save" else Mode.INVERT,)
    return tuple(mode for mode in modes if mode in wanted) or modes


def _only(profile: Profile, mode: Mode) -> Profile:
    """The profile with this mode alone for every operator that has it."""

    def choose(options: tuple[Option, ...]) -> tuple[Option, ...]:
        return tuple(option for option in options if option.mode is mode) or options

    return dataclasses.replace(profile, options=tuple(choose(options) for options in profile.options))

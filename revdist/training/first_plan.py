"""The first plans of a run, which wait for no solver, and for no profile.

Loading the compiled solver takes longer than several steps of a small model. A schedule that is good
enough to start with is found without it: the fastest there is where the memory allows it, else the
thriftiest. The solver's plan follows as the first replan.

Of a model that was never seen on this type of device not even a profile is there. It starts with everything
rebuilt that can be, in small micro-batches, and is measured between its first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from revdist.planning.batch import Cut, StepTimeCurve
from revdist.planning.costs import Mode, Option, Profile, Schedule
from revdist.planning.interpolation import interpolate
from revdist.planning.replay import schedule_of

_THRIFTIEST = (Mode.INVERT, Mode.RECOMPUTE, Mode.SAVE)


def first_curve(
    profiles: Sequence[Profile], budget_bytes: int, *, micro_batch: int | None, max_share: int
) -> StepTimeCurve | None:
    """A curve for the largest measured micro-batch, or the configured one, that fits; None where none does."""
    sizes = [micro_batch] if micro_batch is not None else [profile.micro_batch for profile in profiles]
    for size in sorted(sizes, reverse=True):
        profile = interpolate(profiles, size)
        for preference in (_fastest, _thriftiest):
            schedule = _choose(profile, preference)
            if max(schedule.need_bytes, profile.step_peak_bytes) <= budget_bytes:
                return _curve(profile, schedule, max_share=max_share, budget_bytes=budget_bytes)
    return None


def unprofiled_curve(
    options: Sequence[tuple[Mode, ...]], budget_bytes: int, *, micro_batch: int, max_share: int, exact: bool
) -> StepTimeCurve:
    """A curve for a chain of which only the modes are known: it may need the whole budget, and any time.

    options: the modes of each operator. exact: nothing may be inverted.
    """
    schedule = Schedule(modes=thriftiest_modes(options, exact=exact), need_bytes=budget_bytes)
    cut = Cut(micro_batch=micro_batch, micro_batch_s=0.0, sample_s=0.0, schedule=schedule)
    return StepTimeCurve(max_share=max_share, cuts=(cut,), budget_bytes=budget_bytes)


def thriftiest_modes(options: Sequence[tuple[Mode, ...]], *, exact: bool = False) -> tuple[Mode, ...]:
    """Per operator the mode that holds least on the device, as far as can be said without a profile."""
    preferred = [mode for mode in _THRIFTIEST if not (exact and mode is Mode.INVERT)]
    return tuple(next((mode for mode in preferred if mode in offered), offered[0]) for offered in options)


def _choose(profile: Profile, preference: Callable[[Option], float]) -> Schedule:
    return schedule_of(profile, [min(options, key=preference).mode for options in profile.options])


def _fastest(option: Option) -> float:
    return option.extra_s


def _thriftiest(option: Option) -> float:
    return option.held_bytes


def _curve(profile: Profile, schedule: Schedule, *, max_share: int, budget_bytes: int) -> StepTimeCurve:
    cut = Cut(
        micro_batch=profile.micro_batch,
        micro_batch_s=0.0,
        sample_s=(profile.base_s + schedule.extra_s) / profile.micro_batch,
        schedule=schedule,
    )
    return StepTimeCurve(max_share=max_share, cuts=(cut,), budget_bytes=budget_bytes)

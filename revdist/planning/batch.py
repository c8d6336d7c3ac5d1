"""From a device's profiles and budget to the time it takes for any share of the global batch.

A replica cuts its share s into k micro-batches whose sizes differ by one at most. With time
a + b * size for a micro-batch under a given schedule, the step takes k * a + b * s however the
share is cut into k parts. A larger micro-batch pays the constant part a less often, but leaves less
memory, so that its schedule is slower: each micro-batch size has its own frontier, and

    step_s(s) = overhead + min over cuts (m, a, b) of ( ceil(s / m) * a + b * s )

is exact over the micro-batch sizes tried: all up to 8, then four per doubling, up to twice the largest
measured, as a device that turns out faster than its peers gets more than the share it was measured for.
Each cut's time grows with s, so step_s does too, which `split` relies on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from revdist.errors import BudgetTooSmall, InvalidCosts
from revdist.planning.costs import Mode, Profile, Schedule
from revdist.planning.interpolation import interpolate, neighbours, ordered_profiles

if TYPE_CHECKING:
    from revdist.planning.frontier import Frontier

__all__ = ["BatchChoice", "Cut", "StepTimeCurve", "candidates", "interpolate", "micro_batch_sizes", "step_time_curve"]

MAX_SHARE = 2**24
"""Largest share a curve may cover."""
_REACH = 2
"""Multiple of the largest measured micro-batch up to which the line through two measured ones is followed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One way to cut a share: at most `micro_batch` samples at a time, under one schedule."""

    micro_batch: int
    micro_batch_s: float
    """Seconds of each micro-batch whatever its size."""
    sample_s: float
    """Seconds of each sample."""
    schedule: Schedule

    def __post_init__(self) -> None:
        if isinstance(self.micro_batch, bool) or not isinstance(self.micro_batch, int) or self.micro_batch < 1:
            raise InvalidCosts(f"micro_batch must be a positive integer, not {self.micro_batch!r}")
        for name in ("micro_batch_s", "sample_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidCosts(f"{name} is {getattr(self, name)}: it must be finite and not negative")

    def compute_s(self, share: int) -> float:
        """Seconds of forward and backward over `share` samples."""
        return -(-share // self.micro_batch) * self.micro_batch_s + self.sample_s * share


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchChoice:
    """How a replica runs its share."""

    micro_batch: int
    """Samples of the largest of its micro-batches; the others have one fewer or as many."""
    accumulation_steps: int
    schedule: Schedule
    step_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeCurve:
    """Seconds of a step for any share, within one budget: all that the cluster needs of a device."""

    max_share: int
    cuts: tuple[Cut, ...]
    """Those that are fastest for some share, largest micro-batch first."""
    overhead_s: float = 0.0
    """Seconds of a step that do not depend on the share: the optimizer, communication that does not overlap."""
    budget_bytes: int = 0

    def __post_init__(self) -> None:
        _check_max_share(self.max_share)
        if not self.cuts:
            raise InvalidCosts("a step-time curve needs at least one cut")
        if not 0 <= self.overhead_s < float("inf"):
            raise InvalidCosts(f"overhead_s is {self.overhead_s}: it must be finite and not negative")
        if isinstance(self.budget_bytes, bool) or not isinstance(self.budget_bytes, int):
            raise InvalidCosts(f"budget_bytes must be an integer, not {self.budget_bytes!r}")

    def step_s(self, share: int) -> float:
        """Seconds of a step with `share` samples."""
        return self._fastest(share)[0]

    def choice(self, share: int) -> BatchChoice:
        """The fastest way to run `share` samples; of equal ones the one with the fewest micro-batches."""
        step_s, cut = self._fastest(share)
        steps = -(-share // cut.micro_batch)
        return BatchChoice(
            micro_batch=micro_batch_sizes(share, steps)[0],
            accumulation_steps=steps,
            schedule=cut.schedule,
            step_s=step_s,
        )

    def scaled(self, factor: float) -> Self:
        """The curve of a device that turned out `factor` times as slow."""
        cuts = [
            dataclasses.replace(cut, micro_batch_s=cut.micro_batch_s * factor, sample_s=cut.sample_s * factor)
            for cut in self.cuts
        ]
        return dataclasses.replace(self, cuts=tuple(cuts), overhead_s=self.overhead_s * factor)

    def _fastest(self, share: int) -> tuple[float, Cut]:
        if not 1 <= share <= self.max_share:
            raise InvalidCosts(f"share is {share}: this curve covers 1 to {self.max_share} samples")
        compute_s, index = min((cut.compute_s(share), index) for index, cut in enumerate(self.cuts))
        return self.overhead_s + compute_s, self.cuts[index]

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        for cut in fields["cuts"]:
            cut["schedule"]["modes"] = "".join(mode.letter for mode in cut["schedule"]["modes"])
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; raises InvalidCosts for anything else."""
        try:
            fields = json.loads(text)
            fields["cuts"] = tuple(_read_cut(cut) for cut in fields["cuts"])
            return cls(**fields)
        except InvalidCosts:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidCosts(f"not JSON for a StepTimeCurve: {error}") from None


def micro_batch_sizes(share: int, accumulation_steps: int) -> tuple[int, ...]:
    """Sizes of the micro-batches of a step: they differ by one at most, larger ones first."""
    smaller, larger_ones = divmod(share, accumulation_steps)
    return (smaller + 1,) * larger_ones + (smaller,) * (accumulation_steps - larger_ones)


def candidates(most: int) -> tuple[int, ...]:
    """Micro-batch sizes worth trying up to `most`: all up to 8, then four per doubling, and `most`."""
    sizes = {size for size in range(1, 9) if size <= most}
    quarter = 12  # 2 ** (12 / 4) = 8
    while (size := round(2 ** (quarter / 4))) < most:
        sizes.add(size)
        quarter += 1
    return tuple(sorted(sizes | {most}))


def step_time_curve(
    profiles: Sequence[Profile],
    budget_bytes: int,
    *,
    max_share: int,
    micro_batches: Collection[int] = (),
    overhead_s: float = 0.0,
    guarantee: float = 0.01,
    modes: Collection[Mode] | None = None,
) -> StepTimeCurve:
    """Step times of shares 1 to `max_share` within an activation budget.

    profiles: one chain on one device, at one to three micro-batch sizes. micro_batches: the sizes to
    choose from; empty: `candidates` up to twice the largest measured or `max_share`. With one profile, nothing is known
    of a micro-batch's constant time, so its size is kept where it fits, else the largest that does.

    Frontiers do not depend on the budget and are remembered, so a new budget is a look-up.

    Raises BudgetTooSmall where not even the smallest micro-batch fits.
    """
    _check_max_share(max_share)
    largest = max((profile.micro_batch for profile in profiles), default=1)
    sizes = tuple(micro_batches) or candidates(largest if len(profiles) == 1 else min(max_share, _REACH * largest))
    table = _table(tuple(profiles), sizes, guarantee, None if modes is None else tuple(modes))
    cuts = table.cuts(budget_bytes)
    return StepTimeCurve(
        max_share=max_share,
        cuts=tuple(cuts[index] for index in _winners(cuts, max_share)),
        overhead_s=overhead_s,
        budget_bytes=budget_bytes,
    )


class _Table:
    """The frontiers of a device by micro-batch size, each solved when it is first needed."""

    def __init__(
        self,
        profiles: Sequence[Profile],
        micro_batches: Collection[int],
        guarantee: float,
        modes: Collection[Mode] | None,
    ) -> None:
        self.profiles = ordered_profiles(profiles)
        self.sizes = sorted(set(micro_batches))
        self.guarantee = guarantee
        self.modes = modes
        self._solved: dict[int, tuple[Profile, Frontier]] = {}

    def solved(self, micro_batch: int) -> tuple[Profile, Frontier]:
        if micro_batch not in self._solved:
            profile = interpolate(self.profiles, micro_batch)
            # Loaded by the first that solves: a run takes its first steps before that.
            from revdist.planning.frontier import solve

            self._solved[micro_batch] = profile, solve(profile, guarantee=self.guarantee, modes=self.modes)
        return self._solved[micro_batch]

    def cuts(self, budget_bytes: int) -> list[Cut]:
        """What fits, largest micro-batch first."""
        fitting = [size for size in self.sizes[: self._num_fitting(budget_bytes)] if self._needs(size) <= budget_bytes]
        if not fitting:
            smallest = self.sizes[0]
            raise BudgetTooSmall(
                budget_bytes, self._needs(smallest), where=f"a micro-batch of {smallest}", remedy="free that much"
            )
        if len(self.profiles) == 1:
            fitting = fitting[-1:]
        return [self._cut(size, budget_bytes) for size in reversed(fitting)]

    def _num_fitting(self, budget_bytes: int) -> int:
        """How many sizes to look at: bisection, since a larger micro-batch needs more."""
        low, high = 0, len(self.sizes)
        while low < high:
            middle = (low + high) // 2
            if self._needs(self.sizes[middle]) <= budget_bytes:
                low = middle + 1
            else:
                high = middle
        return low

    def _needs(self, micro_batch: int) -> int:
        profile, frontier = self.solved(micro_batch)
        return max(frontier.minimum_bytes, profile.step_peak_bytes)

    def _cut(self, micro_batch: int, budget_bytes: int) -> Cut:
        profile, frontier = self.solved(micro_batch)
        schedule = frontier.best(budget_bytes)
        total_s = profile.base_s + schedule.extra_s
        constant_s = 0.0
        if len(self.profiles) > 1:
            low, high = neighbours(self.profiles, micro_batch)
            low_s, high_s = _seconds(low, schedule), _seconds(high, schedule)
            slope_s = max(0.0, (high_s - low_s) / (high.micro_batch - low.micro_batch))
            constant_s = min(total_s, max(0.0, total_s - slope_s * micro_batch))
        return Cut(
            micro_batch=micro_batch,
            micro_batch_s=constant_s,
            sample_s=(total_s - constant_s) / micro_batch,
            schedule=schedule,
        )


@functools.lru_cache(maxsize=8)
def _table(
    profiles: tuple[Profile, ...], micro_batches: tuple[int, ...], guarantee: float, modes: tuple[Mode, ...] | None
) -> _Table:
    return _Table(profiles, micro_batches, guarantee, modes)


def _seconds(profile: Profile, schedule: Schedule) -> float:
    """Time of a schedule on another micro-batch size than the one it was solved for."""
    chosen = zip(profile.options, schedule.modes, strict=True)
    return profile.base_s + sum(option.extra_s for options, mode in chosen for option in options if option.mode is mode)


def _winners(cuts: Sequence[Cut], max_share: int) -> list[int]:
    """Positions of the cuts that are fastest for some share, in their order."""
    shares = np.arange(1, max_share + 1)
    best = np.full(max_share, np.inf)
    owner: npt.NDArray[np.int64] = np.zeros(max_share, np.int64)
    for index, cut in enumerate(cuts):
        compute_s = -(-shares // cut.micro_batch) * cut.micro_batch_s + cut.sample_s * shares
        faster = compute_s < best
        best[faster] = compute_s[faster]
        owner[faster] = index
    return [int(index) for index in np.unique(owner)]


def _check_max_share(max_share: Any) -> None:
    if isinstance(max_share, bool) or not isinstance(max_share, int):
        raise InvalidCosts(f"max_share must be an integer, not {max_share!r}")
    if not 1 <= max_share <= MAX_SHARE:
        raise InvalidCosts(f"max_share is {max_share}: it must lie between 1 and {MAX_SHARE}")


def _read_cut(fields: dict[str, Any]) -> Cut:
    letters = {mode.letter: mode for mode in Mode}
    schedule = dict(fields["schedule"])
    schedule["modes"] = tuple(letters[letter] for letter in schedule["modes"])
    return Cut(**{**fields, "schedule": Schedule(**schedule)})

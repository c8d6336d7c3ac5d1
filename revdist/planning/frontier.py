"""The best schedule for every budget at once.

Source: Jiang, Zhu, Liu, Gu, Pan, "An Efficient Training Framework for Reversible Neural
Architectures", ECCV 2020, who pick modes under one memory limit by a 0/1 knapsack. Here the memory
is the exact peak (prefix sums, `costs`) and one pass solves all limits (`sweep`), so that a new
memory reading is a look-up. Derivation, proof and limits: docs/planning.md.

What it does not do: order operators, choose where a chain is cut, or plan layers outside the
chain. Times of operators add up; communication that overlaps with them is not modelled.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Collection
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from revdist.errors import BudgetTooSmall, InvalidCosts
from revdist.planning.costs import MAX_BYTES, Mode, Profile, Schedule
from revdist.planning.kernels import CHOICES_PER_BYTE, OPTION_BITS, OPTION_MASK, warm_up
from revdist.planning.stages import arrange
from revdist.planning.sweep import sweep, unpack

__all__ = ["Frontier", "solve", "warm_up"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frontier:
    """A step function from budgets to schedules: P steps over n operators, read-only arrays."""

    modes: tuple[tuple[Mode, ...], ...]
    """Per operator: the modes that `choices` count through."""
    budgets_bytes: npt.NDArray[np.int64]
    """(P,) strictly increasing: the need of each schedule, `outside_bytes` included."""
    extra_s: npt.NDArray[np.float64]
    """(P,) strictly decreasing: seconds of one micro-batch over the fastest options."""
    choices: npt.NDArray[np.uint8]
    """(P, ceil(n / 4)) two bits an operator, lowest first."""
    guarantee: float
    """0.0: exact. Else extra_s <= optimum + guarantee * (reference_s + optimum) on every budget, where
    reference_s is `base_s`, or the slowest schedule's extra time where that is more."""

    def __post_init__(self) -> None:
        for array in (self.budgets_bytes, self.extra_s, self.choices):
            array.flags.writeable = False

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget that any schedule fits."""
        return int(self.budgets_bytes[0])

    @property
    def maximum_bytes(self) -> int:
        """The budget beyond which nothing gets faster."""
        return int(self.budgets_bytes[-1])

    def best(self, budget_bytes: float) -> Schedule:
        """The fastest schedule within a budget.

        Raises BudgetTooSmall, naming the missing bytes, where none fits.
        """
        return self.schedule(self.index(budget_bytes))

    def index(self, budget_bytes: float) -> int:
        """Position of the best schedule within a budget; raises BudgetTooSmall where none fits."""
        if math.isnan(budget_bytes):
            raise InvalidCosts("budget_bytes is not a number")
        budget = int(min(budget_bytes, MAX_BYTES) // 1) if budget_bytes > 0 else math.floor(max(budget_bytes, -1))
        index = int(self.budgets_bytes.searchsorted(budget, side="right")) - 1
        if index < 0:
            raise BudgetTooSmall(budget, self.minimum_bytes)
        return index

    def schedule(self, index: int) -> Schedule:
        """The schedule of one step of the frontier."""
        picked = unpack(self.choices[index], len(self.modes))
        return Schedule(
            modes=tuple(options[choice] for options, choice in zip(self.modes, picked, strict=True)),
            extra_s=float(self.extra_s[index]),
            need_bytes=int(self.budgets_bytes[index]),
        )

    def __len__(self) -> int:
        return len(self.budgets_bytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frontier):
            return NotImplemented
        return (
            self.modes == other.modes
            and self.guarantee == other.guarantee
            and np.array_equal(self.budgets_bytes, other.budgets_bytes)
            and np.array_equal(self.extra_s, other.extra_s)
            and np.array_equal(self.choices, other.choices)
        )

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> str:
        return json.dumps(
            {
                "modes": self.modes,
                "budgets_bytes": self.budgets_bytes.tolist(),
                "extra_s": self.extra_s.tolist(),
                "choices": base64.b64encode(self.choices.tobytes()).decode("ascii"),
                "guarantee": self.guarantee,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; raises InvalidCosts for anything else."""
        try:
            fields = json.loads(text)
            return cls._from_fields(fields)
        except InvalidCosts:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, binascii.Error) as error:
            raise InvalidCosts(f"not JSON for a Frontier: {error}") from None

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Self:
        modes = tuple(tuple(Mode(mode) for mode in options) for options in fields["modes"])
        budgets = np.array(fields["budgets_bytes"], np.int64)
        extra_s = np.array(fields["extra_s"], np.float64)
        guarantee = float(fields["guarantee"])
        packed = np.frombuffer(base64.b64decode(fields["choices"], validate=True), np.uint8)
        _check_arrays(budgets, extra_s, guarantee)
        choices = packed.reshape(len(budgets), -(-len(modes) // CHOICES_PER_BYTE)).copy()
        _check_choices(modes, choices)
        return cls(modes=modes, budgets_bytes=budgets, extra_s=extra_s, choices=choices, guarantee=guarantee)


def solve(profile: Profile, *, guarantee: float = 0.01, modes: Collection[Mode] | None = None) -> Frontier:
    """The frontier of a profile: the best schedule for every budget.

    Exact unless the lists of schedules outgrow their bound; then the step time base_s + extra_s stays
    within `guarantee` of the optimum on every budget, and `frontier.guarantee` says what was reached.
    (Where the slowest schedule's extra time exceeds base_s, as when base_s is not given, the fraction
    is counted from it instead.) With a guarantee of 0.0 the answer is exact or refused. `modes`
    restricts what may be chosen.

    Raises InvalidCosts for modes that an operator does not offer, UsageError where an exact answer
    is too large.
    """
    if not 0 <= guarantee < math.inf:
        raise InvalidCosts(f"guarantee is {guarantee}: it must be finite and not negative, 0.01 for one percent")
    stages = arrange(profile, modes)
    solution = sweep(stages, guarantee)
    return Frontier(
        modes=stages.modes,
        budgets_bytes=solution.need_bytes + profile.outside_bytes,
        extra_s=solution.extra_s,
        choices=solution.choices,
        guarantee=solution.guarantee,
    )


def _check_arrays(budgets: npt.NDArray[np.int64], extra_s: npt.NDArray[np.float64], guarantee: float) -> None:
    if budgets.ndim != 1 or budgets.shape != extra_s.shape or len(budgets) == 0:
        raise InvalidCosts("a Frontier needs as many budgets_bytes as extra_s, and at least one")
    if budgets[0] < 0 or budgets[-1] > MAX_BYTES or (budgets[1:] <= budgets[:-1]).any():
        raise InvalidCosts(f"budgets_bytes must increase, from 0 at least to {MAX_BYTES} at most")
    if not (np.isfinite(extra_s).all() and extra_s[-1] >= 0) or (extra_s[1:] >= extra_s[:-1]).any():
        raise InvalidCosts("extra_s must be finite, not negative and decrease")
    if not 0 <= guarantee < math.inf:
        raise InvalidCosts(f"guarantee is {guarantee}: it must be finite and not negative")


def _check_choices(modes: tuple[tuple[Mode, ...], ...], choices: npt.NDArray[np.uint8]) -> None:
    if not modes:
        raise InvalidCosts("a Frontier needs at least one operator: the chain is empty")
    shifts = OPTION_BITS * np.arange(CHOICES_PER_BYTE, dtype=np.uint8)
    picked = ((choices[:, :, None] >> shifts) & OPTION_MASK).reshape(len(choices), -1)[:, : len(modes)]
    beyond = (picked.max(axis=0, initial=0) >= [len(options) for options in modes]).nonzero()[0]
    if len(beyond):
        raise InvalidCosts(f"choices of operator {beyond[0]} name an option it does not have")

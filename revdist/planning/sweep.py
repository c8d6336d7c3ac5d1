"""The dynamic program over a chain: one pass from the last operator to the first, then recovery.

For the suffix that starts at operator i, reached in state s (`costs.Before`: what the operator before
does), the list L_i(s) holds every non-dominated pair (need in bytes, time in ticks):

    L_n(s) = {(0, 0)}
    L_i(s) = non-dominated of { (held_i(c, s) + max(working_i(c, s), m), extra_i(c) + v)
                                : c an option of i, (m, v) in L_{i+1}(leads_to(c)) }

(Nemhauser and Ullmann's dominance rule for the 0/1 knapsack, Management Science 15(9), 1969, with
the prefix sums of `costs` in place of one sum.) L_0(0) answers every budget.

Lists can grow exponentially where bytes are all distinct and times proportional to them. Past
`LIST_POINTS`, points are dropped, each in favour of one that needs no more and whose
reference + time is at most a ratio larger. Such ratios multiply from operator to operator and never
to more than 1 + guarantee (proof in docs/planning.md).

Links that recover the schedules are kept for the operators nearest the front, and recomputed from
stored lists, a segment at a time, for the others: memory stays bounded for any chain length.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from revdist.errors import UsageError
from revdist.planning import kernels
from revdist.planning.costs import Before
from revdist.planning.kernels import CHOICES_PER_BYTE, OPTION_BITS, OPTION_MASK, Ints, Links, Lists
from revdist.planning.stages import Stages

LIST_POINTS = 2**14
"""Length past which a list is thinned, where a guarantee allows it."""
MOST_POINTS = 2**20
"""Length past which solving is refused."""
ANSWER_SHARE = 0.1
"""Part of the guarantee that is left for thinning the answer itself."""
SEGMENT_OPERATORS = 128
"""Shortest segment; shorter ones cost more calls than they save memory."""
HISTORY_POINTS = 2**24
"""Links kept, of 4 bytes each; the others are recomputed."""
CHOICE_BYTES = 2**25
"""Size past which the recovered schedules are thinned, where a guarantee allows it."""

NUM_STATES = len(Before)
NO_LINKS = np.empty(0, np.int32)
NO_STARTS = np.empty((0, NUM_STATES), np.int64)


@dataclasses.dataclass(slots=True)
class Segment:
    """Operators first..last-1, the lists behind them and, while kept, their links."""

    first: int
    last: int
    behind: tuple[Lists, Lists]
    """Needs and times."""
    links: Links
    """Of all operators, one after another; empty once forgotten."""
    starts: Ints
    """(last - first, 3) where the links of each operator start, by state."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Every non-dominated schedule of the chain, P of them over n operators."""

    need_bytes: Ints
    """(P,) strictly increasing."""
    extra_s: npt.NDArray[np.float64]
    """(P,) strictly decreasing; added up in chain order."""
    choices: npt.NDArray[np.uint8]
    """(P, ceil(n / 4)) two bits an operator, lowest first: which option it takes."""
    guarantee: float
    """Largest relative excess of reference + extra over the optimum; 0.0 is exact."""


def sweep(stages: Stages, guarantee: float) -> Solution:
    """Solve every budget.

    Raises UsageError where the guarantee does not allow dropping enough points.
    """
    trim = Trim(stages, guarantee)
    lists = empty_suffix()
    segments: list[Segment] = []
    length = max(SEGMENT_OPERATORS, math.isqrt(stages.num_operators - 1) + 1)
    for last in range(stages.num_operators, 0, -length):
        segment = Segment(max(0, last - length), last, lists, NO_LINKS, NO_STARTS)
        lists = _run(stages, segment, trim, again=False)
        segments.append(segment)
        _forget(segments)
    need, time = lists[0][Before.KEEPS], lists[1][Before.KEEPS]
    kept = trim.answer(need, time)
    return _recover(stages, segments, trim, need, kept)


def unpack(packed: npt.NDArray[np.uint8], num_operators: int) -> list[int]:
    """Option of every operator from one row of `Solution.choices`."""
    shifts = np.arange(CHOICES_PER_BYTE, dtype=np.uint8) * OPTION_BITS
    picked = (packed[:, None] >> shifts) & OPTION_MASK
    return [int(choice) for choice in picked.ravel()[:num_operators].tolist()]


class Trim:
    """Decides where lists are thinned, how far, and adds up what that may have cost."""

    def __init__(self, stages: Stages, guarantee: float) -> None:
        self.stages = stages
        self.reference = stages.reference
        self.guarantee = guarantee
        self.allowed = math.log1p(guarantee) * (1 - 1e-6)  # the rest is room for rounding, see `reached`
        self.spent = 0.0
        self.ratios = [1.0] * stages.num_operators
        """Per operator: the ratio by which its lists were thinned, so that thinning can be repeated."""

    @property
    def reached(self) -> float:
        """The guarantee that holds, with room for the rounding of the ratios themselves."""
        return 0.0 if self.spent == 0 else math.expm1(self.spent) + 2.0**-50 * len(self.ratios)

    def plan(self, operator: int, time: Ints) -> float:
        """The ratio by which an operator's lists are to be thinned; 1.0 keeps every point."""
        if len(time) <= LIST_POINTS or self.guarantee == 0:
            check_length(self.stages, operator, len(time))
            return 1.0
        left = self.allowed * (1 - ANSWER_SHARE) - self.spent
        self.ratios[operator] = self._ratio(time, left / (operator + 1), LIST_POINTS // 2)
        return self.ratios[operator]

    def answer(self, need: Ints, time: Ints) -> Ints:
        """Positions of the points of the first list to recover schedules for."""
        most = max(2, CHOICE_BYTES * CHOICES_PER_BYTE // len(self.ratios))
        if len(need) <= most or self.guarantee == 0:
            return np.arange(len(need))
        ratio = self._ratio(time, self.allowed - self.spent, most // 2)
        kept, worst = kernels.thin(time, self.reference, ratio)
        self.spend(worst)
        return kept

    def spend(self, worst: float) -> None:
        """Note the largest ratio that thinning made use of."""
        self.spent += math.log(worst)

    def _ratio(self, time: Ints, most: float, points: int) -> float:
        """The ratio that leaves about `points` points, or that of a logarithm of `most` where that is less."""
        span = math.log((self.reference + float(time[0])) / (self.reference + float(time[-1])))
        return math.exp(min(most, span / points))


def check_length(stages: Stages, operator: int, length: int) -> None:
    """Refuse lists that memory and time have no room for."""
    if length > MOST_POINTS:
        raise UsageError(
            f"operators {operator} to {stages.num_operators - 1} have {length} schedules worth keeping, over the "
            f"limit of {MOST_POINTS}: allow a larger guarantee"
        )


def empty_suffix() -> tuple[Lists, Lists]:
    """Needs and times behind the last operator: nothing is needed and nothing takes time."""
    zero = np.zeros(1, np.int64)
    return (zero, zero, zero), (zero, zero, zero)


def _run(stages: Stages, segment: Segment, trim: Trim, *, again: bool) -> tuple[Lists, Lists]:
    """Extend the lists over a segment and keep its links; `again` repeats an earlier run to the bit."""
    lists, operator, used = segment.behind, segment.last, 0
    segment.starts = np.empty((segment.last - segment.first, NUM_STATES), np.int64)
    parts = []
    while operator > segment.first:
        needs, times, links, starts, reached = kernels.sweep_back(
            stages.held,
            stages.working,
            stages.ticks,
            stages.leads_to,
            stages.num_options,
            stages.same_as,
            segment.first,
            operator,
            LIST_POINTS,
            *lists,
        )
        lists = needs, times
        starts = starts[reached - segment.first :]
        ratio = trim.ratios[reached] if again else trim.plan(reached, max(times, key=len))
        if ratio > 1.0:
            lists, links, worst = _thin(lists, links, starts[0], trim.reference, ratio)
            if not again:
                trim.spend(worst)
                check_length(stages, reached, max(map(len, lists[1])))
        segment.starts[reached - segment.first : operator - segment.first] = starts + used
        parts.append(links)
        used += len(links)
        operator = reached
    segment.links = np.concatenate(parts)
    return lists


def _thin(
    lists: tuple[Lists, Lists], links: Links, starts: Ints, reference: float, ratio: float
) -> tuple[tuple[Lists, Lists], Links, float]:
    """Thin the lists of the last operator swept, whose links start at `starts` and are the last ones."""
    parts, used, worst = [links[: starts[0]]], int(starts[0]), 1.0
    thinned: dict[int, tuple[int, Ints, Ints]] = {}
    for need, time, start in zip(*lists, starts.tolist(), strict=True):
        if start not in thinned:
            kept, spent = kernels.thin(time, reference, ratio)
            thinned[start] = used, need[kept], time[kept]
            parts.append(links[start:][kept])
            used, worst = used + len(kept), max(worst, spent)
    states = [thinned[start] for start in starts.tolist()]
    starts[:] = [start for start, _, _ in states]
    (_, need_0, time_0), (_, need_1, time_1), (_, need_2, time_2) = states
    return ((need_0, need_1, need_2), (time_0, time_1, time_2)), np.concatenate(parts), worst


def _forget(segments: list[Segment]) -> None:
    """Drop links of the segments last needed, those at the end of the chain, past the limit."""
    total = sum(len(segment.links) for segment in segments)
    for segment in segments[:-1]:
        if total <= HISTORY_POINTS:
            return
        total -= len(segment.links)
        segment.links = NO_LINKS


def _recover(stages: Stages, segments: list[Segment], trim: Trim, need: Ints, points: Ints) -> Solution:
    """Walk every schedule from the first operator to the last."""
    num_points, num_operators = len(points), stages.num_operators
    need = need[points]
    states = np.zeros(num_points, np.int64)
    total_s = np.zeros(num_points, np.float64)
    choices = np.zeros((-(-num_operators // CHOICES_PER_BYTE), num_points), np.uint8)
    while segments:
        segment = segments.pop()
        if len(segment.links) == 0:
            _run(stages, segment, trim, again=True)
        kernels.walk(
            segment.links,
            segment.starts,
            stages.leads_to,
            stages.extra_s,
            segment.first,
            points,
            states,
            total_s,
            choices,
        )
    # Equal to a tick, times can differ the other way in the last bit of their float sums.
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], total_s[:-1])))
    kept = total_s < best_before
    return Solution(
        need_bytes=need[kept],
        extra_s=total_s[kept],
        choices=np.ascontiguousarray(choices.T[kept]),
        guarantee=trim.reached,
    )

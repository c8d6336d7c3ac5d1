"""The dynamic program over a chain: one pass from the last operator to the first, then recovery.

For the suffix that starts at operator i, reached in state s (1: the operator before holds its
output), the list L_i(s) holds every non-dominated pair (need in bytes, time in ticks):

    L_n(s) = {(0, 0)}
    L_i(s) = non-dominated of { (held_i(c, s) + max(working_i(c), m), extra_i(c) + v)
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
from revdist.planning.kernels import Ints, Links
from revdist.planning.stages import Stages

LIST_POINTS = 2**16
"""Length past which a list is thinned, where a guarantee allows it."""
MOST_POINTS = 2**20
"""Length past which solving is refused."""
ANSWER_SHARE = 0.1
"""Part of the guarantee that is left for thinning the answer itself."""
HISTORY_POINTS = 2**24
"""Links kept, of 4 bytes each; the others are recomputed."""
CHOICE_BYTES = 2**25
"""Size past which the recovered schedules are thinned, where a guarantee allows it."""
CHOICES_PER_BYTE = 8 // kernels.OPTION_BITS

Lists = tuple[Ints, Ints, Ints, Ints]
"""Need and time of state 0, then of state 1; both the same arrays where the state makes no difference."""
Points = tuple[Ints, Ints, Links]
"""One list with its links: need, time, links."""


@dataclasses.dataclass(slots=True)
class Segment:
    """Operators first..last-1, the lists behind them and, while kept, their links."""

    first: int
    last: int
    behind: Lists
    links: list[tuple[Links, Links]]

    @property
    def num_links(self) -> int:
        return sum(len(first) + (len(last) if last is not first else 0) for first, last in self.links)


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
    length = math.isqrt(stages.num_operators - 1) + 1
    for last in range(stages.num_operators, 0, -length):
        segment = Segment(max(0, last - length), last, lists, [])
        lists = _run(stages, segment, trim, again=False)
        segments.append(segment)
        _forget(segments)
    need, time = lists[:2]
    kept = trim.answer(need, time)
    return _recover(stages, segments, trim, need, kept)


def unpack(packed: npt.NDArray[np.uint8], num_operators: int) -> list[int]:
    """Option of every operator from one row of `Solution.choices`."""
    shifts = np.arange(CHOICES_PER_BYTE, dtype=np.uint8) * kernels.OPTION_BITS
    picked = (packed[:, None] >> shifts) & (2**kernels.OPTION_BITS - 1)
    return [int(choice) for choice in picked.ravel()[:num_operators].tolist()]


class Trim:
    """Decides where lists are thinned, how far, and adds up what that may have cost."""

    def __init__(self, stages: Stages, guarantee: float) -> None:
        self.stages = stages
        self.reference = stages.reference
        self.guarantee = guarantee
        self.allowed = math.log1p(guarantee)
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


def empty_suffix() -> Lists:
    """The lists behind the last operator: nothing is needed and nothing takes time."""
    zero = np.zeros(1, np.int64)
    return zero, zero, zero, zero


def _run(stages: Stages, segment: Segment, trim: Trim, *, again: bool) -> Lists:
    """Extend the lists over a segment and keep its links; `again` repeats an earlier run to the bit."""
    lists = segment.behind
    segment.links = []
    for operator in range(segment.last - 1, segment.first - 1, -1):
        points = [extend(stages, operator, state, lists) for state in stages.reached[operator]]
        ratio = trim.ratios[operator] if again else trim.plan(operator, max((p[1] for p in points), key=len))
        if ratio > 1.0:
            points, worst = _thin(points, trim.reference, ratio)
            if not again:
                trim.spend(worst)
                check_length(stages, operator, max(len(p[0]) for p in points))
        first, last = points[0], points[-1]
        lists = first[0], first[1], last[0], last[1]
        segment.links.append((first[2], last[2]))
    segment.links.reverse()
    return lists


def extend(stages: Stages, operator: int, state: int, lists: Lists) -> Points:
    """One list of an operator, reached in `state`, from the lists behind it."""
    options = slice(len(stages.modes[operator]))
    return kernels.extend(
        stages.held[state, operator, options],
        stages.working[operator, options],
        stages.ticks[operator, options],
        stages.leads_to[operator, options],
        *lists,
    )


def _thin(lists: list[Points], reference: float, ratio: float) -> tuple[list[Points], float]:
    thinned = []
    worst = 1.0
    for need, time, links in lists:
        kept, cost = kernels.thin(time, reference, ratio)
        thinned.append((need[kept], time[kept], links[kept]))
        worst = max(worst, cost)
    return thinned, worst


def _forget(segments: list[Segment]) -> None:
    """Drop links of the segments last needed, those at the end of the chain, past the limit."""
    total = sum(segment.num_links for segment in segments)
    for segment in segments[:-1]:
        if total <= HISTORY_POINTS:
            return
        total -= segment.num_links
        segment.links = []


def _recover(stages: Stages, segments: list[Segment], trim: Trim, need: Ints, points: Ints) -> Solution:
    """Walk every schedule from the first operator to the last."""
    num_points, num_operators = len(points), stages.num_operators
    need = need[points]
    states = np.zeros(num_points, np.int64)
    total_s = np.zeros(num_points, np.float64)
    choices = np.zeros((-(-num_operators // CHOICES_PER_BYTE), num_points), np.uint8)
    while segments:
        segment = segments.pop()
        if not segment.links:
            _run(stages, segment, trim, again=True)
        for operator, (links_0, links_1) in enumerate(segment.links, start=segment.first):
            byte, place = divmod(operator, CHOICES_PER_BYTE)
            kernels.walk(
                points,
                states,
                links_0,
                links_1,
                stages.leads_to[operator],
                stages.extra_s[operator],
                total_s,
                choices[byte],
                place * kernels.OPTION_BITS,
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

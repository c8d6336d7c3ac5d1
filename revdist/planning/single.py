"""The best schedule for one budget of a very long chain: the sweep, with everything hopeless pruned.

A suffix's point (m, v) is dropped where

- m exceeds what the operators before leave at least: it can never fit,
- another point fits whatever the operators before hold, and is faster,
- v plus a lower bound on the extra time of the operators before, given that they may hold at most
  budget - m, is no less than a schedule already known. The bound is the linear relaxation: operators
  move along the lower convex hulls of their (held, extra) options, steepest segment first (Sinha and
  Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979).

The schedule already known comes from a first pass that keeps only the points of lowest bound. What
remains in the second is few points around the optimum. Where times are proportional to bytes every
point lies on the bound, which then tells nothing: a guarantee is needed, or the answer is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection

import numpy as np

from revdist.errors import BudgetTooSmall, InvalidCosts
from revdist.planning import kernels
from revdist.planning.costs import MAX_BYTES, Before, Mode, Profile, Schedule
from revdist.planning.kernels import OPTION_BITS, OPTION_MASK, Ints, Links, Lists, Points
from revdist.planning.replay import schedule_of
from revdist.planning.stages import Stages, arrange
from revdist.planning.sweep import check_length, empty_suffix

FIRST_POINTS = 2**10
"""Points kept per list in the search for a first schedule."""


@dataclasses.dataclass(frozen=True, slots=True)
class Relaxation:
    """Hull segments of every operator, steepest first, and where each operator's hull starts."""

    operator: Ints
    """(H,) operator of each segment."""
    held: Ints
    """(H,) bytes that a segment adds."""
    saved: Ints
    """(H,) ticks that it saves."""
    least_held: Ints
    """(n,) bytes of each operator's smallest option."""
    most_ticks: Ints
    """(n,) ticks of the same."""

    def before(self, operator: int) -> tuple[Ints, Ints]:
        """Breakpoints (bytes held, least ticks) of the bound for the operators before `operator`."""
        mine = self.operator < operator
        held = np.concatenate(([self.least_held[:operator].sum()], self.held[mine])).cumsum()
        ticks = np.concatenate(([self.most_ticks[:operator].sum()], -self.saved[mine])).cumsum()
        return held, ticks


def solve_at(
    profile: Profile, budget_bytes: float, *, guarantee: float = 0.0, modes: Collection[Mode] | None = None
) -> Schedule:
    """The fastest schedule of a chain within one budget, without the rest of the frontier.

    base_s + extra_s is within `guarantee` of the optimum, counted as in `solve`; 0.0 is exact.

    Raises BudgetTooSmall where none fits, InvalidCosts for modes that an operator does not offer,
    UsageError where the answer is too large for the guarantee.
    """
    if not 0 <= guarantee < math.inf:
        raise InvalidCosts(f"guarantee is {guarantee}: it must be finite and not negative, 0.01 for one percent")
    if math.isnan(budget_bytes):
        raise InvalidCosts("budget_bytes is not a number")
    budget_bytes = int(max(-1, min(budget_bytes, MAX_BYTES)) // 1)
    stages = arrange(profile, modes)
    room = budget_bytes - profile.outside_bytes
    minimum = _minimum(stages)
    if room < minimum:
        raise BudgetTooSmall(budget_bytes, minimum + profile.outside_bytes)
    search = _Search(stages, room)
    choices = search.run(math.inf, FIRST_POINTS)
    assert choices is not None
    known = sum(int(stages.ticks[operator, choice]) for operator, choice in enumerate(choices))
    target = (stages.reference + known) / (1 + guarantee) - stages.reference if guarantee else float(known)
    choices = search.run(target) or choices
    return schedule_of(profile, [options[choice] for options, choice in zip(stages.modes, choices, strict=True)])


class _Search:
    """The sweep for one budget: `room` bytes of activations."""

    def __init__(self, stages: Stages, room: int) -> None:
        self.stages = stages
        self.room = room
        self.relaxation = _relax(stages)
        self.least, self.most = _held_before(stages)

    def run(self, target: float, most_points: int = 0) -> list[int] | None:
        """Options of the fastest schedule of at most `target` ticks; None: there is none.

        most_points: keep that many points of lowest bound per list, besides the one that needs least;
        the schedule may then not be the fastest. 0: keep all that can lead to one.
        """
        lists = empty_suffix()
        history: list[tuple[Links, ...]] = []
        for operator in range(self.stages.num_operators - 1, -1, -1):
            points = self._points(operator, lists, target, most_points)
            longest = max(len(need) for need, _, _ in points)
            if longest == 0:
                return None
            check_length(self.stages, operator, longest)
            lists = _lists(*points)
            history.append(tuple(links for _, _, links in points))
        return _follow(self.stages, history[::-1], len(lists[0][0]) - 1)

    def _points(
        self, operator: int, lists: tuple[Lists, Lists], target: float, most_points: int
    ) -> tuple[Points, Points, Points]:
        held, ticks = self.relaxation.before(operator)
        points: list[Points] = []
        for state, same in enumerate(self.stages.same_as[operator].tolist()):
            if same < state:
                points.append(points[same])
                continue
            need, time, links = _extend(self.stages, operator, state, lists)
            kept, bounds = kernels.prune(
                need, time, self.room, self.least[operator], self.most[operator], held, ticks, target
            )
            if 0 < most_points < len(kept):
                lowest = np.argpartition(bounds, most_points)[:most_points]
                kept = kept[np.union1d(lowest, [0])]
            points.append((need[kept], time[kept], links[kept]))
        return points[0], points[1], points[2]


def _extend(stages: Stages, operator: int, state: int, lists: tuple[Lists, Lists]) -> Points:
    options = slice(stages.num_options[operator])
    return kernels.extend(
        stages.held[state, operator, options],
        stages.working[state, operator, options],
        stages.ticks[operator, options],
        stages.leads_to[operator, options],
        *lists,
    )


def _lists(*points: Points) -> tuple[Lists, Lists]:
    """Needs and times of the lists of the three states."""
    (need_0, time_0, _), (need_1, time_1, _), (need_2, time_2, _) = points
    return (need_0, need_1, need_2), (time_0, time_1, time_2)


def _minimum(stages: Stages) -> int:
    """Bytes of the schedule that needs least."""
    lists = empty_suffix()
    for operator in range(stages.num_operators - 1, -1, -1):
        least = [_extend(stages, operator, state, lists) for state in Before]
        lists = _lists(*((need[:1], time[:1], links[:1]) for need, time, links in least))
    return int(lists[0][0][0])


def _follow(stages: Stages, history: list[tuple[Links, ...]], point: int) -> list[int]:
    state, choices = 0, []
    for operator, links in enumerate(history):
        link = int(links[state][point])
        choices.append(link & OPTION_MASK)
        point, state = link >> OPTION_BITS, int(stages.leads_to[operator, choices[-1]])
    return choices


def _held_before(stages: Stages) -> tuple[Ints, Ints]:
    """Per operator: least and most bytes that the operators before it can hold."""
    counts = [len(modes) for modes in stages.modes]
    least = [int(stages.held[:, operator, :count].min()) for operator, count in enumerate(counts)]
    most = [int(stages.held[:, operator, :count].max()) for operator, count in enumerate(counts)]
    return np.cumsum([0, *least]), np.cumsum([0, *most])


def _relax(stages: Stages) -> Relaxation:
    segments: list[tuple[float, int, int, int]] = []
    starts = []
    for operator, modes in enumerate(stages.modes):
        held = stages.held[:, operator, : len(modes)].min(axis=0).tolist()
        ticks = stages.ticks[operator, : len(modes)].tolist()
        hull = _lower_hull(sorted(zip(held, ticks, strict=True)))
        starts.append(hull[0])
        for (x0, y0), (x1, y1) in itertools.pairwise(hull):
            segments.append(((y0 - y1) / (x1 - x0), operator, x1 - x0, y0 - y1))
    segments.sort(key=lambda segment: -segment[0])
    columns = np.array([segment[1:] for segment in segments], np.int64).reshape(-1, 3)
    least, most = np.array(starts, np.int64).T
    return Relaxation(columns[:, 0].copy(), columns[:, 1].copy(), columns[:, 2].copy(), least, most)


def _lower_hull(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Corners of the lower convex hull with falling time; points sorted by (bytes, ticks)."""
    hull: list[tuple[int, int]] = []
    for x, y in points:
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _lies_above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _lies_above(left: tuple[int, int], middle: tuple[int, int], right: tuple[int, int]) -> bool:
    """Whether `middle` is on or above the line from `left` to `right`."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])

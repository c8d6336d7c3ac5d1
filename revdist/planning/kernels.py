"""The inner loops of planning, compiled by numba and kept in its cache between processes.

A list of points is a pair of arrays `(need, time)`: bytes strictly increasing, time strictly
decreasing, so that point k is the best there is from `need[k]` bytes on. Bytes and times are int64;
times are counted in ticks (see `frontier`), so sums are exact and equal sums are equal.

A link is one int32 per point, `parent << 2 | option`: which option the point took and which point
of the next operator's list it continues with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Links = npt.NDArray[np.int32]
Lists = tuple[Ints, Ints, Ints]
"""Needs, or times, of the lists of the three states; the same array where states make no difference."""
Points = tuple[Ints, Ints, Links]
"""One list with its links: need, time, links."""
Function = TypeVar("Function", bound=Callable[..., Any])

OPTION_BITS = 2
OPTION_MASK = 2**OPTION_BITS - 1
CHOICES_PER_BYTE = 8 // OPTION_BITS


def compiled(function: Function) -> Function:
    """Compile on first call; the machine code is cached where numba finds a writable place.

    numba tries `__pycache__` beside this file, then the user's cache folder. Where neither can be
    written, each process compiles for itself.
    """
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(Function, numba.njit(nogil=True)(function))


@compiled
def extend(held: Ints, working: Ints, extra: Ints, continues: Ints, needs: Lists, times: Lists) -> Points:
    """Put one operator in front of a suffix: every option on every point, non-dominated ones kept.

    Option c continues with list `continues[c]` and maps a point (m, v) of it to
    (held + max(working, m), v + extra). Where m <= working, only the last such point can be
    non-dominated. What remains is one sorted list per option, merged in one pass.
    """
    num_options = len(held)
    position = np.empty(num_options, np.int64)
    length = 0
    for c in range(num_options):
        need = needs[continues[c]]
        position[c] = max(0, np.searchsorted(need, working[c], side="right") - 1)
        length += len(need) - position[c]
    merged_need = np.empty(length, np.int64)
    merged_time = np.empty(length, np.int64)
    links = np.empty(length, np.int32)
    heads = np.empty(num_options, np.int64)  # next point of each option's list: bytes
    costs = np.empty(num_options, np.int64)  # the same point's time
    infinite = np.iinfo(np.int64).max
    for c in range(num_options):
        need, time = needs[continues[c]], times[continues[c]]
        if len(need) == 0:  # nothing fits behind this option
            heads[c] = costs[c] = infinite
        else:
            heads[c] = held[c] + max(working[c], need[position[c]])
            costs[c] = extra[c] + time[position[c]]
    count = 0
    best = infinite
    while True:
        first = 0
        for c in range(1, num_options):
            if heads[c] < heads[first] or (heads[c] == heads[first] and costs[c] < costs[first]):
                first = c
        if heads[first] == infinite:
            break
        if costs[first] < best:
            best = costs[first]
            merged_need[count] = heads[first]
            merged_time[count] = best
            links[count] = position[first] << OPTION_BITS | first
            count += 1
        position[first] += 1
        need, time = needs[continues[first]], times[continues[first]]
        if position[first] < len(need):
            heads[first] = held[first] + max(working[first], need[position[first]])
            costs[first] = extra[first] + time[position[first]]
        else:
            heads[first] = infinite
    # Copies, not views of the longer arrays.
    return merged_need[:count].copy(), merged_time[:count].copy(), links[:count].copy()


@compiled
def append(links: Links, used: int, more: Links) -> Links:
    """`links` with `more` written behind the first `used` of them; grown where it has to be."""
    if used + len(more) > len(links):
        grown = np.empty(2 * (used + len(more)), np.int32)
        for k in range(used):  # numba takes seconds to compile slice assignments
            grown[k] = links[k]
        links = grown
    for k in range(len(more)):
        links[used + k] = more[k]
    return links


@compiled
def sweep_back(
    held: Ints,
    working: Ints,
    ticks: Ints,
    leads_to: Ints,
    num_options: Ints,
    same_as: Ints,
    first: int,
    last: int,
    limit: int,
    needs: Lists,
    times: Lists,
) -> tuple[Lists, Lists, Links, Ints, int]:
    """Put operators last-1, last-2, ... in front of a suffix, down to `first` or to the first list over `limit`.

    Returns the lists of the operator reached, the links of all operators passed, (last - first, 3)
    where each one's links start by state, and the operator reached.
    """
    starts = np.zeros((last - first, 3), np.int64)
    links = np.empty(4096, np.int32)
    used = 0
    operator = last
    need_0, need_1, need_2 = needs
    time_0, time_1, time_2 = times
    while operator > first:
        operator -= 1
        options = num_options[operator]
        ticks_c, leads_to_c = ticks[operator, :options], leads_to[operator, :options]
        begins = starts[operator - first]
        for state in range(3):
            same = same_as[operator, state]
            if same == state:
                begins[state] = used
                need, time, chosen = extend(
                    held[state, operator, :options],
                    working[state, operator, :options],
                    ticks_c,
                    leads_to_c,
                    needs,
                    times,
                )
                links = append(links, used, chosen)
                used += len(chosen)
            else:
                begins[state] = begins[same]
                need, time = (need_0, time_0) if same == 0 else (need_1, time_1)
            if state == 0:
                need_0, time_0 = need, time
            elif state == 1:
                need_1, time_1 = need, time
            else:
                need_2, time_2 = need, time
        needs, times = (need_0, need_1, need_2), (time_0, time_1, time_2)
        if max(len(time_0), len(time_1), len(time_2)) > limit:
            break
    return needs, times, links[:used].copy(), starts, operator


@compiled
def walk(
    links: Links,
    starts: Ints,
    leads_to: Ints,
    extra_s: npt.NDArray[np.float64],
    first: int,
    points: Ints,
    states: Ints,
    total_s: npt.NDArray[np.float64],
    choices: npt.NDArray[np.uint8],
) -> None:
    """Follow every schedule through the operators from `first` on that `links` and `starts` cover, in place.

    points, states: (P,) where each schedule is, in which of the operator's lists. leads_to,
    extra_s: (n, 4) per operator and option, the state it leaves and its seconds, added to total_s (P,).
    choices: (ceil(n / 4), P) bytes that take two bits an operator.
    """
    for j in range(len(starts)):
        operator = first + j
        byte, shift = operator // CHOICES_PER_BYTE, OPTION_BITS * (operator % CHOICES_PER_BYTE)
        for p in range(len(points)):
            link = links[starts[j, states[p]] + points[p]]
            option = link & OPTION_MASK
            points[p] = link >> OPTION_BITS
            states[p] = leads_to[operator, option]
            total_s[p] += extra_s[operator, option]
            choices[byte, p] |= np.uint8(option << shift)


@compiled
def thin(time: Ints, reference: float, ratio: float) -> tuple[Ints, float]:
    """Positions of points to keep so that every other has a kept one before it at most `ratio` slower.

    Slower is measured on `reference + time`. Returns the positions and the largest ratio made use of.
    """
    kept = np.empty(len(time), np.int64)
    count = 0
    worst = 1.0
    last = np.inf
    for k in range(len(time)):
        here = reference + time[k]
        if last <= ratio * here:
            worst = max(worst, last / here)
            continue
        kept[count] = k
        count += 1
        last = here
    return kept[:count].copy(), worst


@compiled
def shares_within(
    limit_s: float,
    starts: Ints,
    micro_batch: Ints,
    micro_batch_s: npt.NDArray[np.float64],
    sample_s: npt.NDArray[np.float64],
    overhead_s: npt.NDArray[np.float64],
    low: Ints,
    high: Ints,
) -> Ints:
    """Per step-time curve, the largest share in low..high whose step takes at most `limit_s`, else low.

    The cuts of curve i are starts[i] to starts[i + 1] - 1 of the arrays that describe them. Times are
    computed in the same order as `StepTimeCurve.step_s` does, to agree to the bit.
    """
    taken = np.empty(len(low), np.int64)
    for i in range(len(low)):
        bottom, top = low[i], high[i]
        while bottom < top:
            share = (bottom + top + 1) // 2
            fits = False
            for j in range(starts[i], starts[i + 1]):
                compute_s = -(-share // micro_batch[j]) * micro_batch_s[j] + sample_s[j] * share
                if overhead_s[i] + compute_s <= limit_s:
                    fits = True
                    break
            if fits:
                bottom = share
            else:
                top = share - 1
        taken[i] = bottom
    return taken


@compiled
def prune(
    need: Ints, time: Ints, room: int, least: int, most: int, held: Ints, ticks: Ints, target: float
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Points of a suffix that can still lead to at most `target` ticks within `room`: positions and bounds.

    least, most: bytes that the operators before can hold. held, ticks: breakpoints of the least time
    those operators take by the bytes they may hold (convex, falling). A bound is a point's time plus that.
    """
    kept = np.empty(len(need), np.int64)
    bounds = np.empty(len(need), np.float64)
    count = 0
    segment = len(held) - 1
    for k in range(len(need)):
        available = room - need[k]
        if available < least:
            break
        if k + 1 < len(need) and need[k + 1] <= room - most:
            continue  # the next point fits as surely and is faster
        while segment > 0 and held[segment] > available:
            segment -= 1
        bound = float(time[k]) + float(ticks[segment])
        if segment + 1 < len(held):
            part = (available - held[segment]) / (held[segment + 1] - held[segment])
            bound += part * (ticks[segment + 1] - ticks[segment])
        if bound - 1.0 < target:  # a tick of room for rounding
            kept[count] = k
            bounds[count] = bound
            count += 1
    return kept[:count].copy(), bounds[:count].copy()


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache, so that no later call pays for it."""
    one, two = np.ones(1, np.int64), np.arange(2, dtype=np.int64)
    second = np.ones(1)
    costs, seconds, by_state = np.ones((1, 4), np.int64), np.ones((1, 4)), np.ones((3, 1, 4), np.int64)
    lists, same_as = (one, one, one), np.zeros((1, 3), np.int64)
    extend(one, one, one, one, lists, lists)
    *_, links, starts, _ = sweep_back(by_state, by_state, costs, costs, one, same_as, 0, 1, 9, lists, lists)
    walk(links, starts, costs, seconds, 0, 0 * one, 0 * one, second, np.zeros((1, 1), np.uint8))
    thin(one, 1.0, 1.0)
    prune(one, one, 1, two[0], two[1], two, two, 1.0)
    shares_within(1.0, two, one, second, second, second, one, one)

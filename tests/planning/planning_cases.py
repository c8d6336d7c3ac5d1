"""Small random chains for every planning test, as hypothesis strategies."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import strategies as st

from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.replay import Replay, replay


@st.composite
def options(draw: st.DrawFn, *, seconds: st.SearchStrategy[float]) -> list[Option]:
    """Up to four options of one operator, what some cost depending on what the operator before does."""
    modes = draw(st.sets(st.sampled_from(list(Mode)), min_size=1))
    made = []
    for mode in Mode:
        if mode in modes:
            held = draw(st.integers(0, 30))
            working = draw(st.integers(0, 30))
            shared = draw(st.integers(0, held)) if draw(st.booleans()) else 0
            handed = draw(st.integers(0, working)) if draw(st.booleans()) else 0
            spared = draw(st.integers(0, working - handed)) if draw(st.booleans()) else 0
            made.append(Option(mode, held, working, draw(seconds), shared, draw(st.booleans()), handed, spared))
    return made


# Quarters of a second: sums of them are exact in floats, so equal must mean equal.
EXACT_SECONDS = st.integers(0, 12).map(lambda quarters: quarters / 4)
ANY_SECONDS = st.floats(0, 10, allow_subnormal=False)


def profiles(
    *, seconds: st.SearchStrategy[float] = EXACT_SECONDS, min_size: int = 1, max_size: int = 6, **fields: Any
) -> st.SearchStrategy[Profile]:
    """Profiles of short chains."""
    return st.builds(
        Profile.from_options,
        st.lists(options(seconds=seconds), min_size=min_size, max_size=max_size),
        outside_bytes=st.integers(0, 20),
        **fields,
    )


def every_schedule(profile: Profile) -> list[tuple[tuple[Mode, ...], Replay]]:
    """All schedules there are, each judged by the simulator."""
    choices = itertools.product(*([option.mode for option in options] for options in profile.options))
    return [(modes, replay(profile, modes)) for modes in choices]


def true_frontier(profile: Profile) -> list[tuple[int, float]]:
    """Non-dominated (need, extra) pairs by trying everything."""
    best: list[tuple[int, float]] = []
    for need, extra in sorted((judged.need_bytes, judged.extra_s) for _, judged in every_schedule(profile)):
        if not best or extra < best[-1][1]:
            best.append((need, extra))
    return best

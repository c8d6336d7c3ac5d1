"""The profile of a model that was never seen on this type of device, measured between its first steps.

Training does not wait for it: see `first_plan`. After each step one micro-batch size is measured, and once every
rank has all of its own, all exchange them, as they do before the first step where profiles are in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import final

from revdist.planning.costs import Profile
from revdist.training.agreement import must_pool
from revdist.training.profiling import Profiling
from revdist.training.row import Row, Stage


@final
class LateProfile:
    """This rank's profiles on the way. Ranks that have theirs take part in the exchange."""

    def __init__(
        self,
        profiling: Profiling,
        measured: Sequence[Profile],
        *,
        coming: Iterator[tuple[Profile, bool]] | None = None,
        done: Callable[[tuple[Profile, ...], float], None],
        learn: Callable[[tuple[Profile, ...]], None],
    ) -> None:
        """measured: before the first step. coming: those that are to be measured, as `Profiling.one_by_one` gives
        them; None: no more.

        done: told of this rank's profiles and how many seconds they took. learn: told of what was exchanged.
        """
        self._profiling = profiling
        self._own = tuple(measured)
        self._coming = coming
        self._done = done
        self._learn = learn
        self._seconds = 0.0
        self.stage = Stage.KNOWN if coming is None else Stage.MEASURING

    def is_due(self, rows: Sequence[Row]) -> bool:
        """Whether there is something to do after a step that all ranks took."""
        return self._coming is not None or must_pool(rows)

    def advance(self) -> None:
        """Measure the next size or, where all are measured, exchange them with the other ranks.

        Raises torch.OutOfMemoryError where not even one sample can be measured, and what a broken group raises:
        then all exchange again after a later step.
        """
        if self._coming is not None:
            self._measure(self._coming)
        else:
            self._learn(self._profiling.pool(self._own))
            self.stage = Stage.KNOWN

    def _measure(self, coming: Iterator[tuple[Profile, bool]]) -> None:
        began_s = time.perf_counter()
        profile, is_last = next(coming)
        self._own = (profile, *self._own)
        self._seconds += time.perf_counter() - began_s
        if is_last:
            self._coming = None
            self.stage = Stage.MEASURED
            self._done(self._own, self._seconds)

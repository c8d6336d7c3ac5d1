"""What a replica tells the outside while it trains, kept until the reader has it."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, final

from revdist.errors import RevdistError
from revdist.planning.batch import StepTimeCurve
from revdist.planning.costs import Plan
from revdist.training.row import Row

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A step that all ranks took. Made by one rank, which knows every rank's row."""

    time: float
    """Seconds since the epoch (Unix), when the step ended."""
    group: int
    """Number of the group that took it."""
    step: int
    epoch: int
    samples: int
    """Samples processed by the run so far, this step included."""
    loss: float
    """Mean loss per sample of the whole batch."""
    lr: float
    step_s: float
    pause_s: float
    """Part of `step_s` spent on attempts that were redone, and on forming another group."""
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """A plan that this replica runs from a step on."""

    time: float
    step: int
    plan: Plan
    free_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EventReport:
    """Something that happened to this replica."""

    time: float
    step: int
    kind: str
    """One of those that events.jsonl names."""
    rank: int
    device: str
    detail: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


TellEvent = Callable[..., None]
"""Called as `tell(kind, detail, **facts)`, from any thread, to report an event of this replica."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """Progress of measuring this replica's device."""

    rank: int
    device: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CurveReport:
    """Step-time curve of a replica at its first budget, or at a new one: the shares may have to follow."""

    rank: int
    curve: StepTimeCurve
    inverted: StepTimeCurve | None
    """The same with INVERT wherever it exists, to compare with; None with the first plan, made without the solver."""
    reason: str
    num_steps: int
    """Length of the run."""
    step: int = 0
    """Steps of the run that this replica holds the state after; 0 for a newcomer that has none yet."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How the model does on data it was not trained on."""

    samples: int
    loss: float
    """Mean loss per sample."""
    accuracy: float | None
    """Share of samples whose largest output is the target; None where targets are no class numbers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BrokenReport:
    """This replica's group is broken, and it waits to be told which one to form."""

    group: int
    """Its number."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogReport:
    """What this replica's process has printed."""

    text: str
    """Whole lines; empty: nothing new."""
    host: str
    read_to: dict[str, int]
    """The files of the host that hold it, and up to which byte they have been sent."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndReport:
    """This replica's training is over, after `step` steps of the run."""

    rank: int
    step: int
    stopped: bool
    """Told to leave before the end of the run; its state is saved."""
    score: Score | None
    """On the test data; None where there are none, or the run was stopped."""
    digest: int | None = None
    """Differs where parameters do, to the bit: all replicas end with the same. None: it took no step."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """This replica cannot go on."""

    time: float
    rank: int
    step: int
    error: RevdistError
    follows: bool
    """The error is that a peer went away: some other rank failed first."""


Report = (
    StepReport
    | PlanReport
    | EventReport
    | ProfileReport
    | CurveReport
    | BrokenReport
    | LogReport
    | EndReport
    | FailureReport
)


_PATIENT = (StepReport, ProfileReport, LogReport)
"""Reports that may wait a little for others: read one by one, those of fast steps would slow the steps down."""
_GATHER_S = 0.2
"""How long they may."""


@final
class Outbox:
    """Reports in order, each kept until a reader says that it has it, so that a new reader misses none."""

    def __init__(self, *, capacity: int = 100_000) -> None:
        self._reports: deque[tuple[int, float, Report]] = deque(maxlen=capacity)
        self._last = 0
        self._closed = False
        self._due_s = math.inf
        """When the first report has waited long enough for others."""
        self._latest: dict[type[Any], Any] = {}
        self._changed = threading.Condition()

    def put(self, report: Report) -> None:
        with self._changed:
            self._latest[type(report)] = report
            self._last += 1
            due_s = time.monotonic() + (_GATHER_S if isinstance(report, _PATIENT) else 0.0)
            self._reports.append((self._last, due_s, report))
            if due_s < self._due_s:
                self._due_s = due_s
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Reports that no reader has acknowledged."""
        return len(self._reports)

    def latest(self, kind: type[T]) -> T | None:
        """The last report of a kind, acknowledged or not."""
        with self._changed:
            return self._latest.get(kind)

    def wait_until_closed(self, timeout_s: float) -> bool:
        """Wait for the last report; whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, timeout=timeout_s)

    def close(self) -> None:
        """No more reports will come: readers need not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def read(self, after: int, *, timeout_s: float) -> tuple[int, list[Report]]:
        """Reports after number `after`, which is thereby acknowledged, and the number of the last one.

        Waits up to `timeout_s` for the first, and a moment for more unless it is urgent; the list is empty where
        none came.
        """
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while self._reports and self._reports[0][0] <= after:
                self._reports.popleft()
            self._due_s = min((due_s for _, due_s, _ in self._reports), default=math.inf)
            while not self._closed and (now_s := time.monotonic()) < min(self._due_s, until_s):
                self._changed.wait(min(self._due_s, until_s) - now_s)
            return (self._reports[-1][0] if self._reports else after), [report for _, _, report in self._reports]

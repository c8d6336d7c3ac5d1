"""The supervisor of a run: gathers what ranks report, decides on shares, writes the run directory.

Training does not depend on it. All that it knows came from reports, which ranks keep until they are
acknowledged, and all that it decides is published by generation; ranks switch by themselves, at the
same step. It runs in the driver's thread and calls the observer from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

from revdist.cluster.actor import Location
from revdist.cluster.failures import Failure, first_failure, run_failed
from revdist.cluster.fleet import Fleet, Lost
from revdist.cluster.logs import LogGatherer
from revdist.cluster.observer import Observer
from revdist.cluster.records import device_records, event_record, replan_record, run_event, step_record, summary_record
from revdist.cluster.rehearsal import Rehearsal
from revdist.cluster.shares import ShareKeeper
from revdist.config import RunConfig
from revdist.errors import Preempted
from revdist.planning.costs import Plan
from revdist.training.checkpoint_files import checkpoints
from revdist.training.orders import Shares
from revdist.training.reports import (
    CurveReport,
    EndReport,
    EventReport,
    FailureReport,
    LogReport,
    PlanReport,
    ProfileReport,
    Report,
    StepReport,
)
from revdist.training.run_directory import RunWriter

_TICK_S = 0.1
_GATHER_S = 2.0
"""After a failure, time for other ranks to say what they saw: the first to speak need not be the first to fail."""
_SAVE_S = 120.0
"""Time for ranks to reach a step boundary and save once they are told to stop."""


@final
class Controller:
    """Supervises one run on a fleet whose replicas have been started."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        locations: Sequence[Location],
        writer: RunWriter,
        observer: Observer,
        *,
        checkpoint_folder: str,
        stop_reason: Callable[[], str | None],
    ) -> None:
        """stop_reason: asked often; why the run shall save and end, None while it shall not."""
        self._config = config
        self._fleet = fleet
        self._locations = locations
        self._writer = writer
        self._observer = observer
        self._checkpoint_folder = checkpoint_folder
        self._stop_reason = stop_reason
        self._keeper = ShareKeeper(config, len(fleet))
        self._logs = LogGatherer(observer)
        self._rehearsal = Rehearsal(config.co_tenants, locations, fleet)
        self._plans: dict[int, list[PlanReport]] = {rank: [] for rank in range(len(fleet))}
        self._ended: dict[int, EndReport] = {}
        self._failures: list[Failure] = []
        self._early_events: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None
        self._num_steps = 0
        self._samples = 0
        self._train_s = 0.0
        self._began_s = time.monotonic()
        self._stop_by_s: float | None = None

    @property
    def started(self) -> bool:
        """Whether training has begun, and with it the run directory."""
        return self._keeper.shares is not None

    @property
    def final_plans(self) -> tuple[Plan, ...]:
        """Per rank: the plan it ended with."""
        return tuple(reports[-1].plan for reports in self._plans.values() if reports)

    def run(self) -> dict[str, Any]:
        """Supervise to the end; returns the summary.

        Raises RunFailed, Preempted after saving, or what kept the run from starting.
        """
        while len(self._ended) < len(self._fleet):
            for rank, said in self._fleet.reports(_TICK_S):
                self._take(rank, said)
            if self._failures:
                self._fail()
            self._stop_if_asked()
        if any(report.stopped for report in self._ended.values()):
            self._preempt()
        return self._finish()

    def gather_logs(self) -> None:
        """Take what ranks have printed last, before they are ended."""
        for rank, report in self._fleet.rest_of_logs():
            self._logs.take(rank, report)

    def _take(self, rank: int, said: Sequence[Report] | Lost) -> None:
        if isinstance(said, Lost):
            self._failures.append(said)
            self._logs.lost(rank)
            return
        for report in said:
            if isinstance(report, LogReport):
                self._logs.take(rank, report)
            self._take_report(report)
            if isinstance(report, EndReport | FailureReport):
                self._fleet.dismiss(rank)

    def _take_report(self, report: Report) -> None:
        match report:
            case StepReport():
                self._take_step(report)
            case PlanReport():
                self._take_plan(report)
            case CurveReport():
                self._take_curve(report)
            case EventReport():
                self._event(event_record(report))
            case ProfileReport():
                self._observer.on_profile(report.rank, report.device, report.done, report.total)
            case EndReport():
                self._ended[report.rank] = report
            case FailureReport():
                self._failures.append(report)

    def _take_step(self, report: StepReport) -> None:
        self._last = step_record(report, self._plans)
        self._writer.metrics(self._last)
        self._samples += sum(row.samples for row in report.rows)
        self._train_s += report.step_s
        self._observer.on_step(self._last)
        for event in self._rehearsal.after_step(report.step):
            self._event(event)
        self._publish(self._keeper.take_rows(report.rows))

    def _take_plan(self, report: PlanReport) -> None:
        earlier = self._plans[report.plan.rank]
        self._writer.plan(report.plan, time=report.time, step=report.step, free_bytes=report.free_bytes)
        self._observer.on_plan(report.plan, report.free_bytes)
        if earlier:
            self._event(replan_record(report, earlier[-1].plan))
        earlier.append(report)

    def _take_curve(self, report: CurveReport) -> None:
        self._num_steps = report.num_steps
        self._publish(self._keeper.take_curve(report))

    def _publish(self, shares: Shares | None) -> None:
        if shares is None:
            return
        if shares.generation == 0:
            self._begin(shares)
        else:
            divided = " + ".join(str(share) for share in shares.by_rank)
            self._event(run_event("replan", self._step, f"generation {shares.generation}: shares {divided}"))
        self._fleet.adopt(shares)

    def _begin(self, shares: Shares) -> None:
        """Every rank has a plan: from here on the run is on disk."""
        self._writer.create(self._config)
        for event in self._early_events:
            self._writer.event(event)
        divided = " + ".join(str(share) for share in shares.by_rank)
        detail = f"{len(self._fleet)} replicas, {self._num_steps} steps, shares {divided}"
        devices = device_records([location.reading for location in self._locations])
        self._event(run_event("start", self._step, detail, num_steps=self._num_steps, devices=devices))

    def _event(self, record: dict[str, Any]) -> None:
        self._observer.on_event(record)
        if self.started:
            self._writer.event(record)
        else:
            self._early_events.append(record)

    @property
    def _step(self) -> int:
        return 0 if self._last is None else int(self._last["step"])

    def _stop_if_asked(self) -> None:
        reason = self._stop_reason()
        if reason is None:
            return
        if not self.started:
            raise Preempted(f"stopped by {reason} before the first step: nothing was written", signal=reason)
        if self._stop_by_s is None:
            self._stop_by_s = time.monotonic() + _SAVE_S
            self._event(run_event("preempted", self._step, f"{reason}: saving at the next step boundary"))
            self._fleet.stop(reason)
        elif time.monotonic() > self._stop_by_s:
            raise Preempted(
                f"stopped by {reason}, and ranks did not save within {_SAVE_S:.0f} s: "
                "resume from the checkpoint before with --resume",
                signal=reason,
            )

    def _preempt(self) -> None:
        reason = self._stop_reason() or "a request"
        saved = checkpoints(self._checkpoint_folder)
        self._event(run_event("end", self._step, f"left after {reason}, saved in {saved[-1] if saved else 'nothing'}"))
        raise Preempted(
            f"stopped by {reason} at step {self._step}, saved: go on with --run-dir {self._writer.path} --resume",
            signal=reason,
            step=self._step,
        )

    def _fail(self) -> None:
        """Let the other ranks say what they saw, then raise what happened first."""
        until_s = time.monotonic() + _GATHER_S
        told = {failure.rank for failure in self._failures}
        while len(told) < len(self._fleet) and time.monotonic() < until_s and self._others_follow():
            for rank, said in self._fleet.reports(_TICK_S):
                self._take(rank, said)
            told = {failure.rank for failure in self._failures}
        failure = first_failure(self._failures)
        error = run_failed(
            failure,
            self._locations[failure.rank],
            started=self.started,
            resumable=bool(checkpoints(self._checkpoint_folder)),
        )
        device = self._locations[failure.rank].reading.uuid
        self._event(run_event("failed", self._step, error.message, rank=failure.rank, device=device))
        raise error

    def _others_follow(self) -> bool:
        """Whether all failures so far follow from one that has not been told yet."""
        return all(isinstance(failure, FailureReport) and failure.follows for failure in self._failures)

    def _finish(self) -> dict[str, Any]:
        summary = summary_record(
            last=self._last,
            score=self._ended[0].score,
            plans=self.final_plans,
            wall_s=time.monotonic() - self._began_s,
            train_s=self._train_s,
            samples=self._samples,
            gains=self._keeper.gains(),
        )
        self._event(run_event("end", self._step, "done"))
        self._writer.summary(summary)
        self._observer.on_end(summary)
        return summary

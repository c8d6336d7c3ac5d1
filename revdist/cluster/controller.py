"""The supervisor of a run: gathers what ranks report, decides on shares and groups, writes the run directory.

Training does not depend on it while nothing happens. All that it knows came from reports, which ranks
keep until they are acknowledged, and all that it decides is published by number; ranks switch by
themselves, at the same step. It runs in the driver's thread and calls the observer from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from revdist.cluster.crew import Crew
from revdist.cluster.failures import Failure, first_failure, is_loss, run_failed
from revdist.cluster.fleet import Lost
from revdist.cluster.logs import LogGatherer
from revdist.cluster.mending import Mender
from revdist.cluster.observer import Observer
from revdist.cluster.plan_history import PlanHistory
from revdist.cluster.records import event_record, replan_record, run_event, start_record, step_record, summary_record
from revdist.cluster.rehearsal import Rehearsal
from revdist.cluster.restarting import Restarter
from revdist.cluster.shares import ShareKeeper
from revdist.cluster.signals import stopped_at_start
from revdist.config import RunConfig
from revdist.errors import NoFreeDevice, Preempted, RevdistError, RunFailed
from revdist.planning.costs import Plan
from revdist.training.checkpoint_files import checkpoints
from revdist.training.orders import Assignment, Shares
from revdist.training.reports import (
    BrokenReport,
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
from revdist.training.run_directory import RunReader, RunWriter

_TICK_S = 0.1
_GATHER_S = 2.0
"""After a failure, time for other ranks to say what they saw: the first to speak need not be the first to fail."""
_LOADING_S = 30.0
"""Least heartbeat before the first step: modules that are loaded may keep a process from answering for a while."""
_SAVE_S = 120.0
"""Time for ranks to reach a step boundary and save once they are told to stop."""


@final
class Controller:
    """Supervises one run on a fleet whose replicas have been started."""

    def __init__(
        self,
        config: RunConfig,
        crew: Crew,
        writer: RunWriter,
        observer: Observer,
        *,
        assign: Callable[[], Assignment],
        restarter: Restarter,
        checkpoint_folder: str,
        stop_reason: Callable[[], str | None],
        restarts: int,
    ) -> None:
        """assign: what a newcomer is to do. restarter: starts all anew where none is left. restarts: as `_lead`.
        stop_reason: asked often; why the run shall save and end, None while it shall not.
        """
        self._config = config
        self._fleet = crew.fleet
        self._writer = writer
        self._observer = observer
        self._assign = assign
        self._restarter = restarter
        self._checkpoint_folder = checkpoint_folder
        self._stop_reason = stop_reason
        self._logs = LogGatherer(observer)
        self._rehearsal = Rehearsal(config.co_tenants, crew.fleet, present=lambda: self._mender.present)
        self._plans = PlanHistory()
        self._ended: dict[int, EndReport] = {}
        self._early_events: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None
        self._num_steps = 0
        self._origin: int | None = None
        """Step at which the run began, or went on; None: it has not."""
        self._samples = 0
        self._train_s = 0.0
        self._began_s = time.monotonic()
        self._stop_by_s: float | None = None
        self._lead(crew, restarts=restarts)
        if crew.standings:
            self._take_over(crew)

    def _lead(self, crew: Crew, *, restarts: int) -> None:
        """Take charge of replicas. restarts: of those that `workers.max_restarts` allows, how many are used up."""
        self._groups = crew.groups
        self._keeper = ShareKeeper(self._config, crew.groups.members)
        self._mender = Mender(
            self._config, crew, self._keeper, assign=self._assign, event=self._event, restarts=restarts
        )
        self._plans.clear()
        self._first_step = 0
        self._last = None

    @property
    def started(self) -> bool:
        """Whether these replicas have begun to train."""
        return self._keeper.shares is not None

    @property
    def final_plans(self) -> tuple[Plan, ...]:
        """Per rank: the plan it ended with."""
        return tuple(filter(None, map(self._plans.newest, self._groups.members)))

    def run(self) -> dict[str, Any]:
        """Supervise to the end; returns the summary.

        Raises RunFailed, Preempted after saving, or what kept the run from starting.
        """
        while not self._is_over:
            for member, said in self._fleet.reports(_TICK_S):
                self._take(member, said)
            self._keep_whole()
            self._stop_if_asked()
        if any(report.stopped for report in self._ended.values()):
            self._preempt()
        return self._finish()

    def gather_logs(self) -> None:
        """Take what ranks have printed last, before they are ended."""
        for member, report in self._fleet.rest_of_logs(self._logs.newest):
            self._logs.take(member, self._groups.rank_of(member), report)

    @property
    def _is_over(self) -> bool:
        """Whether every member that is left has come to its end."""
        left = self._mender.holding
        return bool(left) and all(member in self._ended for member in left)

    def _keep_whole(self) -> None:
        """See to it that there is a group that can take the next step."""
        heartbeat_s = self._config.faults.heartbeat_s
        self._mender.find_silent(self._ended, heartbeat_s if self._last is not None else max(heartbeat_s, _LOADING_S))
        self._mender.find_dead(self._ended)
        failed = bool(self._mender.failures)
        if failed and (not self.started or self._mender.is_beyond_mending()):
            self._gather()
            if not self._restart():
                raise self._failed(self._error())
            return
        self._mender.mend(self._ended)
        if self.started and not self._ended and self._stop_by_s is None:
            self._mender.grow()

    def _take(self, member: int, said: Sequence[Report] | Lost) -> None:
        if isinstance(said, Lost):
            self._mender.take_failure(member, said, ended=self._ended)
            self._logs.lost(member, self._groups.rank_of(member))
            return
        for report in said:
            if isinstance(report, LogReport):
                self._logs.take(member, self._groups.rank_of(member), report)
            self._take_report(member, report)
            if isinstance(report, EndReport | FailureReport):
                self._fleet.dismiss(member)

    def _take_report(self, member: int, report: Report) -> None:
        match report:
            case StepReport():
                self._take_step(report)
            case PlanReport():
                self._take_plan(member, report)
            case CurveReport():
                self._take_curve(member, report)
            case BrokenReport():
                self._mender.take_broken(report)
            case EventReport():
                self._event(event_record(report))
            case ProfileReport():
                self._observer.on_profile(report.rank, report.device, report.done, report.total)
            case EndReport():
                self._ended[member] = report
            case FailureReport():
                self._mender.take_failure(member, report, ended=self._ended)

    def _take_step(self, report: StepReport) -> None:
        if report.step <= self._step:  # a new first rank reports once more what may not have arrived
            return
        devices = self._mender.take_step(report)
        if devices is not None:
            self._observer.on_regroup(devices)
        seats = self._groups.seats(report.group, len(report.rows))
        self._last = step_record(report, self._plans.at(report.step, seats))
        self._writer.metrics(self._last)
        self._samples += sum(row.samples for row in report.rows)
        self._train_s += report.step_s
        self._observer.on_step(self._last)
        for event in self._rehearsal.after_step(report.step):
            self._event(event)
        if report.group == self._groups.number:
            self._publish(self._keeper.take_rows(report.rows))

    def _take_plan(self, member: int, report: PlanReport) -> None:
        before = self._plans.add(member, report)
        self._writer.plan(report.plan, time=report.time, step=report.step, free_bytes=report.free_bytes)
        self._observer.on_plan(report.plan, report.free_bytes)
        if before is not None:
            self._event(replan_record(report, before))

    def _take_curve(self, member: int, report: CurveReport) -> None:
        self._num_steps = report.num_steps
        if not self.started:
            self._first_step = max(self._first_step, report.step)
        self._mender.take_curve(member)
        shares = self._keeper.take_curve(member, report)
        if not self._groups.pending:
            self._publish(shares)

    def _publish(self, shares: Shares | None) -> None:
        if shares is None:
            return
        self._fleet.adopt(shares, self._groups.members)  # first of all: ranks wait for the first ones
        if shares.generation == 0:
            self._begin(shares)
        else:
            divided = " + ".join(str(share) for share in shares.by_rank)
            self._event(run_event("replan", self._step, f"generation {shares.generation}: shares {divided}"))

    def _begin(self, shares: Shares) -> None:
        """Every rank has a plan: from here on the run is on disk."""
        again = self._origin is None and (self._writer.path / "config.yaml").exists()
        undone = self._writer.create(self._config, step=self._first_step)
        if self._origin is None:
            self._origin = self._first_step
        for event in self._early_events:
            self._writer.event(event)
        self._early_events.clear()
        readings, divided = self._mender.readings, shares.by_rank
        self._event(start_record(self._step, self._num_steps, divided, readings, again=again, undone=undone))

    def _take_over(self, crew: Crew) -> None:
        """Go on where another supervisor was killed: members tell what it knew, the run directory what it wrote."""
        self._writer.create(self._config)
        written = RunReader(self._writer.path)
        starts = [event["step"] for event in written.events() if event["kind"] == "start"]
        self._origin = starts[-1] if starts else -1
        self._last = written.last_step()
        for member, standing in crew.standings.items():
            if standing.plan is not None:
                self._plans.add(member, standing.plan)
                self._observer.on_plan(standing.plan.plan, standing.plan.free_bytes)
            if standing.curve is not None:
                self._num_steps = standing.curve.num_steps
        curves = {member: standing.curve for member, standing in crew.standings.items() if standing.curve is not None}
        self._keeper.take_over(crew.shares, curves)
        self._rehearsal.take_over(self._step)
        detail = f"another one took over {len(crew.standings)} replicas"
        self._event(run_event("supervisor", self._step, detail, num_steps=self._num_steps))
        if crew.is_whole:
            self._fleet.adopt(crew.shares, crew.groups.members)  # not everyone need have received them
        else:
            self._mender.regroup(list(crew.standings), reason="lost", orderly=False)

    def _event(self, record: dict[str, Any]) -> None:
        self._observer.on_event(record)
        if self._origin is not None:
            self._writer.event(record)
        else:
            self._early_events.append(record)

    @property
    def _step(self) -> int:
        return self._first_step if self._last is None else int(self._last["step"])

    def _stop_if_asked(self) -> None:
        reason = self._stop_reason()
        if reason is None:
            return
        if not self.started:
            raise stopped_at_start(reason, resumable=bool(checkpoints(self._checkpoint_folder)))
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

    def _gather(self) -> None:
        """Let the other ranks say what they saw, where what is known so far does not tell what is to be done."""
        until_s = time.monotonic() + _GATHER_S
        while self._mender.left and time.monotonic() < until_s:
            failures = self._mender.failures.values()
            if not (_all_follow(failures) or (self.started and all(map(is_loss, failures)))):
                return
            for member, said in self._fleet.reports(_TICK_S):
                self._take(member, said)

    def _restart(self) -> bool:
        """Start all anew where no replica is left to go on; whether that was called for, and allowed."""
        source = self._restarter.source(self._origin)
        if source is None or not self._may_restart:
            return False
        restarts, error = self._mender.restarts + 1, self._error()
        allowed = self._config.workers.max_restarts
        self._mender.give_up(then="all start again")
        why = "a replica was lost before the first step" if self._origin is None else "no replica is left"
        detail = f"{why}: all start again from {source}, restart {restarts} of {allowed}"
        self._event(run_event("restart", self._step, detail, restarts=restarts))
        try:
            crew = self._restarter.restart(self._fleet)
        except NoFreeDevice as trouble:
            raise self._failed(RunFailed(f"{error.message}; and {trouble.message}", **error.facts)) from trouble
        self._lead(crew, restarts=restarts)
        self._observer.on_regroup(self._mender.readings)
        return True

    @property
    def _may_restart(self) -> bool:
        """Whether replicas are lost, rather than their work impossible, and none is left that could go on.

        Before the first step a process must be lost: a device that is out of order by then stays so.
        """
        failures = self._mender.failures.values()
        return (
            self._stop_by_s is None
            and self._mender.restarts < self._config.workers.max_restarts
            and all(is_loss(failure) for failure in failures)
            and (self._origin is not None or any(isinstance(failure, Lost) for failure in failures))
            and not (self.started and self._mender.holding)
        )

    def _error(self) -> RevdistError:
        """What happened first, as the error that the run ends with."""
        failures = self._mender.failures
        failure = first_failure(list(failures.values()))
        (member,) = [one for one, other in failures.items() if other is failure]
        location = self._mender.location(member)
        return run_failed(
            failure,
            location,
            started=self._origin is not None,
            resumable=bool(checkpoints(self._checkpoint_folder)),
            run_dir=self._writer.path,
        )

    def _failed(self, error: RevdistError) -> RevdistError:
        """Write down that the run failed; returns the error."""
        facts = {key: error.facts[key] for key in ("rank", "device") if key in error.facts}
        self._event(run_event("failed", self._step, error.message, **facts))
        return error

    def _finish(self) -> dict[str, Any]:
        summary = summary_record(
            last=self._last,
            score=next((report.score for report in self._ended.values() if report.score is not None), None),
            plans=self.final_plans,
            wall_s=time.monotonic() - self._began_s,
            train_s=self._train_s,
            samples=self._samples,
            gains=self._keeper.gains(),
            identical=len({report.digest for report in self._ended.values()}) == 1,
        )
        self._event(run_event("end", self._step, "done"))
        self._writer.summary(summary)
        self._observer.on_end(summary)
        return summary


def _all_follow(failures: Iterable[Failure]) -> bool:
    """Whether all failures so far follow from one that has not been told yet."""
    return all(isinstance(failure, FailureReport) and failure.follows for failure in failures)

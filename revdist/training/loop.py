"""The training loop of a replica: steps, the agreement that ends each, and what changes at the boundary.

A step is taken by all ranks or by none. Its end is the only place where anything changes for all:
the next generation of shares, another group, a stop, a checkpoint. A replica's own schedule changes
there too, but asks nobody.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.distributed as dist

from revdist.devices.device import MemoryMeter
from revdist.planning.costs import Plan
from revdist.training.agreement import (
    Agreement,
    mean_loss,
    must_redo,
    must_save,
    must_stop,
    next_generation,
    next_group,
)
from revdist.training.data import slice_of
from revdist.training.local_step import Outcome
from revdist.training.non_finite import Tolerance, non_finite_losses
from revdist.training.optimizer import learning_rate_factor, set_learning_rate
from revdist.training.orders import Inbox, Regroup, Shares
from revdist.training.reports import Outbox, PlanReport, StepReport, TellEvent
from revdist.training.row import Row
from revdist.training.trained import Trained


class Pause(enum.Enum):
    """Why the loop takes no further step."""

    DONE = "the run is at its end"
    STOPPED = "a rank was asked to leave"
    REGROUP = "all ranks are ready for another group"


_UNKNOWN = -1
"""Saved last, after the ranks have changed: they must agree on whether a checkpoint is due, and not all know."""
_KEPT_REPORTS = 64
"""Steps that a rank can report once more: the last ones of a rank that is lost may not have arrived."""


@final
class Loop:
    """Runs the steps of one replica."""

    def __init__(
        self,
        trained: Trained,
        inbox: Inbox,
        outbox: Outbox,
        *,
        tell: TellEvent,
        rank: int,
        first: Shares,
        step: int,
        group: int,
    ) -> None:
        """step: taken by the run so far. group: number of the group that this rank is in."""
        self._t = trained
        self._inbox = inbox
        self._outbox = outbox
        self._tell = tell
        self._meter: MemoryMeter = trained.device.meter()
        self._local = trained.local
        self.rank = rank
        self.step = step
        """Steps taken by the run so far."""
        self.shares = first
        self._group = group
        self._saved_step = step if group == 0 else _UNKNOWN
        self._saved_s = time.monotonic()
        self._asked_to_save = False
        self._reports: deque[StepReport] = deque(maxlen=_KEPT_REPORTS)
        self._version = trained.planner.version
        self.plan = self._make_plan(reason=first.reason)
        self._adopt_plan(self.plan)
        self._step_began_s = time.perf_counter()
        self._pause_s = 0.0
        self._failure: Exception | None = None
        self._tolerance = Tolerance(trained.config.non_finite)

    @property
    def need_bytes(self) -> int:
        """Activation bytes of the plan that holds from the next step on."""
        share = self.shares.by_rank[self.rank]
        return self._t.planner.curve.choice(share).schedule.need_bytes

    def run(self, *, checkpoint: Callable[[], None]) -> Pause:
        """Take steps until something else is to be done.

        Calls `checkpoint` at the boundaries where the configuration wants one. Where the group breaks, the
        step under way is undone, and the loop can be run again in another group.
        """
        while self.step < self._t.parts.num_steps:
            if self._checkpoint_is_due:
                checkpoint()
                self._saved_step, self._saved_s = self.step, time.monotonic()
            rows = self._take_step()
            self._asked_to_save = must_save(rows)
            self._adopt_generation(next_generation(rows))
            self._learn(rows)
            if must_stop(rows):
                return Pause.STOPPED
            if next_group(rows) > self._group:
                return Pause.REGROUP
        return Pause.DONE

    @property
    def reports(self) -> Sequence[StepReport]:
        """The last steps, each known to every rank that took it."""
        return tuple(self._reports)

    def enter(self, order: Regroup, *, step: int, reports: Sequence[StepReport]) -> None:
        """Go on in a group that has been formed, at the step that it agreed on.

        reports: the last ones of the rank that was ahead. Those of a lost first rank may not have arrived,
        so a new one reports them once more; one that stays reports what others took and it did not.
        """
        began_s, self._group = self._step_began_s, order.number
        reported_step = self.step if self.rank == 0 else 0
        self.rank = order.rendezvous.rank
        self.step = step
        self._saved_step, self._asked_to_save = _UNKNOWN, False
        self._reports = deque(reports, maxlen=_KEPT_REPORTS)
        self.shares = order.shares
        self._adopt_plan(self._make_plan(reason=order.shares.reason))
        self._pause_s += time.perf_counter() - began_s
        if self.rank == 0:
            for report in self._reports:
                if report.step > reported_step:
                    self._outbox.put(report)

    def _learn(self, rows: Sequence[Row]) -> None:
        """Measure on, where training began without a profile."""
        if not self._t.late_profile.is_due(rows):
            return
        began_s = time.perf_counter()
        with self._local.undisturbed():
            self._t.late_profile.advance()
        self._meter.reset_peak()
        self._pause_s += time.perf_counter() - began_s

    @property
    def _checkpoint_is_due(self) -> bool:
        every = self._t.config.checkpoint.every_steps
        by_step = every is not None and self.step % every == 0
        return (by_step or self._asked_to_save) and self.step != self._saved_step

    @property
    def _wants_to_save(self) -> bool:
        every_s = self._t.config.checkpoint.every_s
        return every_s is not None and time.monotonic() - self._saved_s >= every_s

    def close(self) -> None:
        self._local.close()

    def fail(self, error: Exception) -> None:
        """Let the next step raise this, from any thread: the device is of no use any more."""
        self._failure = error

    def _take_step(self) -> Sequence[Row]:
        """One step, redone until all ranks could do their part."""
        if self._failure is not None:
            raise self._failure
        while True:
            self._adopt_local_replan()
            began_s, pause_s = time.perf_counter(), self._pause_s
            try:
                rows = self._attempt()
                left_out = not must_redo(rows) and self._is_left_out(rows)
            except Exception:
                self._local.restore_buffers()
                raise
            if not must_redo(rows):
                break
            self._local.restore_buffers()
            self._pause_s = pause_s + time.perf_counter() - began_s
        if left_out:
            self._local.restore_buffers()
        else:
            self._update()
        self.step += 1
        self._report(rows)
        return rows

    def _attempt(self) -> list[Row]:
        """Gradients of the whole batch, unless some rank's word in the rows says that they are not."""
        order, rank = self._t.parts.order, self.rank
        batch = order.batch(self.step)
        group = dist.group.WORLD
        assert group is not None
        agreement: Agreement | None = None

        def agree(outcome: Outcome) -> None:
            nonlocal agreement
            self._pause_s += outcome.retried_s
            agreement = Agreement(self._row(outcome), group)

        self._local.run(
            self._t.parts.train,
            batch[slice_of(self.shares.by_rank, rank, len(batch))],
            step=self.step,
            rank=rank,
            scale=dist.get_world_size() / len(batch),
            micro_batch=self.plan.micro_batch,
            smaller_plan=self._smaller_plan,
            on_their_way=agree,
        )
        assert agreement is not None, "gradients were handed in, and nothing was said of it"
        self._meter.reset_peak()
        return agreement.rows()

    def _row(self, outcome: Outcome) -> Row:
        return Row(
            samples=outcome.samples,
            loss_sum=outcome.loss_sum,
            failed=outcome.failed,
            stop=self._inbox.stop_reason is not None,
            save=self._wants_to_save,
            newest_generation=self._inbox.newest_generation,
            newest_group=self._inbox.ready_group,
            profile_stage=self._t.late_profile.stage,
            generation=self.shares.generation,
            share=self.plan.share,
            micro_batch=self.plan.micro_batch,
            step_s=outcome.step_s,
            compute_s=outcome.compute_s,
            peak_bytes=self._meter.peak_bytes(),
            predicted_peak_bytes=self.plan.predicted_peak_bytes,
            predicted_step_s=self.plan.predicted_step_s,
            budget_bytes=self.plan.budget_bytes,
            free_bytes=self._t.memory.last.free_bytes,
            demoted_bytes=outcome.demoted_bytes,
        )

    def _is_left_out(self, rows: Sequence[Row]) -> bool:
        """Whether no rank takes the update of this step, for a loss that is not finite.

        Raises NonFiniteLoss on every rank alike where that ends the run.
        """
        batch = self._t.parts.order.batch(self.step)
        errors = non_finite_losses(rows, batch, self.shares.by_rank, step=self.step)
        left_out = self._tolerance.bear(errors)
        for error in errors:
            if error.facts["rank"] == self.rank:
                self._tell("non-finite", f"left out: {error.message}", samples=error.facts["samples"])
        return left_out

    def _update(self) -> None:
        """Move the parameters along the whole batch's gradient."""
        optimizer = self._t.config.optimizer
        if optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._t.replicated.parameters, optimizer.clip_norm)
        set_learning_rate(self._t.optimizer, self._learning_rate_factor())
        self._t.optimizer.step()

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self._t.config.optimizer, self.step, self._t.parts.num_steps)

    def _report(self, rows: Sequence[Row]) -> None:
        now_s = time.perf_counter()
        step_s, self._step_began_s = now_s - self._step_began_s, now_s
        pause_s, self._pause_s = self._pause_s, 0.0
        order = self._t.parts.order
        report = StepReport(
            time=time.time(),
            group=self._group,
            step=self.step,
            epoch=order.epoch(self.step - 1),
            samples=order.samples_before(self.step),
            loss=mean_loss(rows),
            lr=self._t.optimizer.param_groups[0]["lr"],
            step_s=step_s,
            pause_s=pause_s,
            rows=tuple(rows),
        )
        self._reports.append(report)
        if self.rank == 0:
            self._outbox.put(report)

    def _adopt_generation(self, generation: int) -> None:
        if generation > self.shares.generation:
            self.shares = self._inbox.take(generation)
            own_memory_changed = self._t.planner.version != self._version
            reason = self._t.planner.reason if own_memory_changed else self.shares.reason
            self._adopt_plan(self._make_plan(reason=reason))

    def _adopt_local_replan(self) -> None:
        if self._t.planner.version != self._version:
            self._adopt_plan(self._make_plan(reason=self._t.planner.reason))

    def _make_plan(self, *, reason: str) -> Plan:
        self._version = self._t.planner.version
        share = self.shares.by_rank[self.rank]
        return self._t.planner.plan(share, rank=self.rank, generation=self.shares.generation, reason=reason)

    def _adopt_plan(self, plan: Plan) -> None:
        self.plan = plan
        self._t.parts.chain.set_schedule(plan.schedule.modes)
        free_bytes = self._t.memory.last.free_bytes
        self._outbox.put(PlanReport(time=time.time(), step=self.step, plan=plan, free_bytes=free_bytes))

    def _smaller_plan(self, shortage: str) -> int:
        """Give way to a lack of memory: adopt a smaller plan at once and return its micro-batch."""
        self._tell("out-of-memory", shortage.splitlines()[0])
        self._t.planner.give_way(self.plan, self._t.memory.budget_bytes())
        self._adopt_plan(self._make_plan(reason="memory-lost"))
        return self.plan.micro_batch

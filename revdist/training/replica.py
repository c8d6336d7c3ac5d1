"""The life of one replica: build, measure, train, score, save. No Ray: orders come in, reports go out.

Runs in a thread of its own beside whatever process hosts it, which talks to it through an `Inbox`
and an `Outbox`.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist

from revdist.devices.device import Device
from revdist.errors import DeviceError, DeviceLost, RevdistError, RunFailed, UsageError
from revdist.planning.accuracy import largest_error
from revdist.planning.costs import Mode, Profile
from revdist.planning.replay import uniform
from revdist.training.evaluation import evaluate
from revdist.training.group import Group, announce, is_broken
from revdist.training.late_profile import LateProfile
from revdist.training.loop import Loop, Pause
from revdist.training.membership import Membership
from revdist.training.memory import MemoryWatch
from revdist.training.optimizer import build_optimizer
from revdist.training.orders import Assignment, Inbox
from revdist.training.parts import Parts, build_parts
from revdist.training.profiling import Profiling, sizes_to_profile
from revdist.training.reports import CurveReport, EndReport, EventReport, FailureReport, Outbox, ProfileReport, Score
from revdist.training.saving import Saver
from revdist.training.shortage import explain_shortage
from revdist.training.state import digest
from revdist.training.trained import Trained

_log = logging.getLogger(__name__)
T = TypeVar("T")


@final
class Replica:
    """One rank of a run on one device."""

    def __init__(
        self, assignment: Assignment, device: Device, inbox: Inbox, outbox: Outbox, listener: socket.socket | None
    ) -> None:
        """listener: the socket that a group's store will listen on, where this rank is its first."""
        self._assignment = assignment
        self._config = assignment.config
        self._device = device
        self._inbox = inbox
        self._outbox = outbox
        self._group = Group(device.kind, listener)
        inbox.interrupt = self._group.interrupt
        self._membership: Membership | None = None
        self._saver = Saver(assignment.config, assignment.checkpoints, self._event)
        self._step = 0
        self._free_bytes = 0
        self._trained: Trained | None = None
        self._loop: Loop | None = None

    @property
    def step(self) -> int:
        """Steps of the run taken so far."""
        return self._step if self._loop is None else self._loop.step

    @property
    def rank(self) -> int:
        """This replica's number in its group; a newcomer's is -1."""
        if self._membership is not None:
            return self._membership.rank
        first = self._assignment.rendezvous
        return -1 if first is None else first.rank

    def run(self) -> None:
        """The whole life. Never raises: what goes wrong is the last report."""
        try:
            self._live()
        except Exception as error:
            expected = isinstance(error, RevdistError)
            _log.log(logging.DEBUG if expected else logging.ERROR, "rank %d failed", self.rank, exc_info=True)
            self._saver.close()
            self._outbox.put(self._failure(error))
        finally:
            self._outbox.close()

    def _live(self) -> None:
        torch.set_num_threads(self._config.threads_per_worker)
        self._device.activate(f"revdist {self._config.name} rank {self.rank}")
        if self._assignment.rendezvous is not None:
            announce(self._assignment.rendezvous)  # before user code is called, which may ask for its rank
        self._trained = trained = self._prepare()
        self._membership = Membership(trained, self._group, self._inbox, self._outbox, rank=self.rank)
        self._report_curve(trained, "start")  # answered by shares, or by an order to join
        self._loop = self._begin(trained, self._membership)
        if self._loop is None:
            self._outbox.put(EndReport(rank=self.rank, step=self._step, stopped=True, score=None))
            return
        watch = self._watch(trained, self._loop)
        watch.start()
        try:
            finished = self._train(trained, self._loop)
            watch.stop()
            self._with_the_others(lambda: self._save_last(trained))
            score = self._with_the_others(lambda: self._score(trained)) if finished else None
        finally:
            watch.stop()
            self._loop.close()
        self._leave(trained)
        self._saver.finish()
        self._outbox.put(
            EndReport(
                rank=self.rank,
                step=self._loop.step,
                stopped=not finished,
                score=score,
                digest=digest(trained.parts.model),
            )
        )

    def _begin(self, trained: Trained, membership: Membership) -> Loop | None:
        """The loop, once there are shares for this rank; None when told to stop first."""
        if self._assignment.rendezvous is not None:
            first = self._inbox.wait_for_first()
            step, group = self._step, 0
        else:
            entry = membership.follow(None)
            first = None if entry is None else entry.order.shares
            step, group = (0, 0) if entry is None else (entry.step, entry.order.number)
        if first is None:
            return None
        return Loop(
            trained,
            self._inbox,
            self._outbox,
            tell=self._event,
            rank=self.rank,
            first=first,
            step=step,
            group=group,
        )

    def _train(self, trained: Trained, loop: Loop) -> bool:
        """Take all steps of the run, through as many groups as it takes; False where told to stop before."""
        while True:
            try:
                pause = self._with_the_others(lambda: loop.run(checkpoint=lambda: self._save(trained)))
            except torch.OutOfMemoryError as error:
                if trained.planner.has_profiles:
                    raise
                raise self._explained() from error
            if pause is not Pause.REGROUP:
                return pause is Pause.DONE
            self._follow()

    def _with_the_others(self, work: Callable[[], T]) -> T:
        """Do work that takes all ranks; where some are lost meanwhile, again with those that are left."""
        assert self._membership is not None
        while True:
            try:
                return work()
            except Exception as error:
                if not is_broken(error):
                    raise
                self._membership.lose()
            self._follow()

    def _follow(self) -> None:
        """Go on in the group that is ordered next."""
        assert self._membership is not None
        assert self._loop is not None
        entry = self._membership.follow(self._loop)
        if entry is None:
            self._save_alone(self._loop)
            raise RunFailed("told to stop while the group was broken: the newest checkpoint holds the state")
        self._loop.enter(entry.order, step=entry.step, reports=entry.reports)

    def _prepare(self) -> Trained:
        """Everything that the steps work on, with a first curve."""
        self._free_bytes = self._device.read().free_bytes
        if self._assignment.resume:
            self._saver.recall_profiles()
        try:
            parts = build_parts(self._config, self._device.torch_device, self._assignment.data)
            profiling = Profiling(self._config, parts.model, parts.loss_fn, parts.train, self._device)
            known = profiling.cached(self._saver.known_sizes)
            sizes = known or sizes_to_profile(self._config, self._assignment.world_size)
            at_once = self._may_start_at_once and not known and profiling.cached(sizes) != sizes
            profiles = () if at_once else self._profile(profiling, sizes)
            if self._assignment.rendezvous is None:
                self._group.join_alone()
            else:
                self._group.join(self._assignment.rendezvous)
            pooled = profiling.pool(profiles)
            late = self._late_profile(profiling, profiles, sizes if at_once else ())
            optimizer = build_optimizer(self._config.optimizer, parts.trainable)
            trained = Trained.laid_out(
                self._config,
                self._device,
                parts,
                optimizer,
                resume=lambda: self._resume(parts, optimizer),
                profiles=pooled,
                late_profile=late,
                first_micro_batch=min(sizes),
            )
            self._saver.remember(profiling.known)
        except torch.OutOfMemoryError as error:
            raise self._explained() from error
        trained.planner.start(trained.memory.budget_bytes())
        return trained

    def _report_curve(self, trained: Trained, reason: str) -> None:
        self._outbox.put(
            CurveReport(
                rank=self.rank,
                curve=trained.planner.curve,
                inverted=None if reason == "start" else trained.planner.inverted_curve(),
                reason=reason,
                num_steps=trained.parts.num_steps,
                step=self.step,
            )
        )

    @property
    def _may_start_at_once(self) -> bool:
        """Whether the first step need not wait for a profile.

        A newcomer measures while the others train. Shares that are chosen once, for the whole run, have to be
        chosen by what was measured.
        """
        if self._config.planning.profile_first:
            return False
        can_change = self._config.replan.shares or self._config.planning.share == "equal"
        return self._assignment.rendezvous is not None and (can_change or self._assignment.world_size == 1)

    def _profile(self, profiling: Profiling, sizes: tuple[int, ...]) -> tuple[Profile, ...]:
        began_s = time.perf_counter()
        profiles = profiling.profiles(sizes, self._tell_progress)
        self._tell_profiles(profiles, time.perf_counter() - began_s, measured=profiling.num_cached < len(profiles))
        return profiles

    def _late_profile(
        self, profiling: Profiling, profiles: tuple[Profile, ...], coming: tuple[int, ...]
    ) -> LateProfile:
        """What is left to measure once training has begun, and what is done with it then."""

        def learn(exchanged: tuple[Profile, ...]) -> None:
            trained = self._trained
            assert trained is not None
            had_some = trained.planner.has_profiles
            trained.planner.learn(exchanged)
            trained.parts.chain.never_inverted = trained.planner.never_inverted
            self._saver.remember(profiling.known)
            if had_some:
                trained.planner.replan(trained.memory.budget_bytes(), reason="profile")
                self._report_curve(trained, "profile")
            else:  # the solver's follows, as soon as it is loaded
                trained.planner.start(trained.memory.budget_bytes(), reason="profile")

        return LateProfile(
            profiling,
            profiles,
            coming=profiling.one_by_one(coming, self._tell_progress) if coming else None,
            done=functools.partial(self._tell_profiles, measured=True),
            learn=learn,
        )

    def _tell_progress(self, done: int, total: int) -> None:
        self._outbox.put(ProfileReport(rank=self.rank, device=self._device.uuid, done=done, total=total))

    def _tell_profiles(self, profiles: tuple[Profile, ...], seconds: float, *, measured: bool) -> None:
        sizes = ", ".join(str(profile.micro_batch) for profile in profiles)
        how = "measured" if measured else "from the cache"
        detail = f"micro-batches of {sizes} {how} in {seconds:.1f} s{_accuracy(profiles[-1])}"
        self._event("profile", detail, seconds=seconds)

    def _explained(self) -> UsageError:
        return explain_shortage(self._config, self._device, self._free_bytes, self._assignment.data)

    def _resume(self, parts: Parts, optimizer: torch.optim.Optimizer) -> None:
        """Take up the state of the newest checkpoint where the run goes on; a newcomer gets that of a survivor."""
        if self._assignment.resume and self._assignment.rendezvous is not None:
            self._step = self._saver.resume(parts, optimizer, rank=self.rank)

    def _watch(self, trained: Trained, loop: Loop) -> MemoryWatch:
        def replanned(reason: str) -> None:
            self._report_curve(trained, reason)

        def lost(error: DeviceError) -> None:
            self._event("lost", str(error))
            if isinstance(error, DeviceLost):
                loop.fail(error)

        return MemoryWatch(
            self._config,
            trained.memory,
            trained.planner,
            need_bytes=lambda: loop.need_bytes,
            replanned=replanned,
            lost=lost,
            has_begun=lambda: bool(loop.reports) and trained.planner.has_profiles,
        )

    def _score(self, trained: Trained) -> Score | None:
        if not self._config.evaluate or trained.parts.test is None or self._loop is None:
            return None
        return evaluate(
            trained.replicated,
            trained.parts.test,
            shares=self._loop.shares.by_rank,
            rank=self.rank,
            micro_batch=self._loop.plan.micro_batch,
            device=self._device.torch_device,
            precision=self._config.precision,
        )

    def _save(self, trained: Trained) -> None:
        """Save the state at a step boundary that all ranks have reached."""
        assert self._loop is not None
        shares = self._loop.shares
        trained.replicated.average_buffers(shares.by_rank[self.rank])
        plans: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(plans, self._loop.plan)
        self._saver.save(
            trained.parts, trained.optimizer, step=self._loop.step, rank=self.rank, shares=shares, plans=plans
        )

    def _save_last(self, trained: Trained) -> None:
        """Save the state that the run ends with. All ranks hold it until it is written: who writes it may be lost."""
        self._saver.wait_with_others()
        self._save(trained)
        self._saver.wait_with_others()

    def _save_alone(self, loop: Loop) -> None:
        """Save what this replica holds where nobody leads the run any more, and nobody else has saved as much."""
        may_write, trained = self._inbox.may_write, self._trained
        if may_write is not None and trained is not None:
            with may_write() as mine:
                if mine:
                    parts, optimizer = trained.parts, trained.optimizer
                    self._saver.save_alone(parts, optimizer, step=loop.step, shares=loop.shares, plans=(loop.plan,))

    def _leave(self, trained: Trained) -> None:
        """Leave the group together: rank 0 hosts the store that the others still talk to.

        Everything is done by now: a peer that does not come has left, or is lost, and is not waited for.
        """
        try:
            dist.barrier()
        except RuntimeError as error:
            if not is_broken(error):
                raise
        trained.replicated.disconnect()
        self._group.leave()

    def _event(self, kind: str, detail: str, **facts: Any) -> None:
        self._outbox.put(
            EventReport(
                time=time.time(),
                step=self.step,
                kind=kind,
                rank=self.rank,
                device=self._device.uuid,
                detail=detail,
                facts=facts,
            )
        )

    def _failure(self, error: Exception) -> FailureReport:
        follows = is_broken(error)
        if not isinstance(error, RevdistError):
            where = traceback.format_exception(error)
            error = RunFailed(
                f"{type(error).__name__}: {_first_line(error)}", cause=type(error).__name__, traceback="".join(where)
            )
        return FailureReport(time=time.time(), rank=self.rank, step=self.step, error=error, follows=follows)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _accuracy(profile: Profile) -> str:
    """What is known of how far inverted activations are from the originals."""
    error = largest_error(profile, uniform(profile, Mode.INVERT).modes)
    return f"; inverting all that can be is off by {error:.1e} at most" if 0 < error < math.inf else ""

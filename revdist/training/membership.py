"""A replica's way from one group into the next, with the state of training that all of them share.

Replicas hold the same state at every step boundary, so nothing is lost while one of them lives. When
ranks are lost, the others leave the broken group, form the one they are ordered to and redo the step
that was under way. A rank may have taken a step that another did not hear the end of: the highest step
wins, and who is behind gets the state from a rank that is there. Newcomers get it the same way.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist

from revdist.errors import RunFailed
from revdist.training.group import Group, is_broken
from revdist.training.loop import Loop
from revdist.training.orders import Inbox, Regroup
from revdist.training.reports import BrokenReport, Outbox, StepReport
from revdist.training.state import digest, send_state
from revdist.training.trained import Trained

_log = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Longest wait for the order to form another group: a supervisor that died is followed by then, or given up."""
_NEWCOMER = -1
"""Stands for the step of a rank that has no state yet."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A group that has been formed, and where the run stands in it."""

    order: Regroup
    step: int
    reports: Sequence[StepReport]


@final
class Membership:
    """Takes one replica through the groups of a run."""

    def __init__(self, trained: Trained, group: Group, inbox: Inbox, outbox: Outbox, *, rank: int) -> None:
        self._t = trained
        self._group = group
        self._inbox = inbox
        self._outbox = outbox
        self.rank = rank
        self.number = 0
        """Number of the group that this replica is in."""
        inbox.prepare = self._prepare

    def lose(self) -> None:
        """Say that the group broke."""
        self._outbox.put(BrokenReport(group=self.number))

    def follow(self, loop: Loop | None) -> Entry | None:
        """Leave the group and enter the newest one ordered, once it is; None where told to stop meanwhile.

        loop: None for a newcomer, which has no state yet.

        Raises RunFailed where no order comes.
        """
        while True:
            self._t.replicated.disconnect()
            self._group.leave()
            order = self._await_order(newcomer=loop is None)
            if order is None:
                return None
            self.number = order.number
            try:
                return self._enter(order, loop)
            except Exception as error:
                if not is_broken(error):
                    raise
                self.lose()

    def _prepare(self, order: Regroup) -> None:
        """Connect to a group that is to be entered at a step boundary, while training goes on."""
        threading.Thread(target=self._connect, args=(order,), name="revdist-connect", daemon=True).start()

    def _connect(self, order: Regroup) -> None:
        """Be ready for a group once it is connected; where that fails, training goes on in the present one."""
        try:
            self._group.prepare(order.rendezvous, number=order.number)
        except Exception as error:
            # The supervisor orders another group: without who was lost, or the same ranks once more.
            _log.info("group %d was given up before it was entered: %s", order.number, error)
            self._outbox.put(BrokenReport(group=order.number))
        else:
            self._inbox.is_ready(order.number)

    def _await_order(self, *, newcomer: bool) -> Regroup | None:
        order = self._inbox.wait_for_regroup(self.number, timeout_s=None if newcomer else PATIENCE_S)
        if order is None and self._inbox.stop_reason is None:
            raise RunFailed(
                f"group {self.number} broke, and no supervisor ordered another one within {PATIENCE_S:.0f} s; "
                "look at whether the launching process still runs"
            )
        return order

    def _enter(self, order: Regroup, loop: Loop | None) -> Entry:
        self._group.join(order.rendezvous, number=order.number)
        self.rank = order.rendezvous.rank
        if loop is None:
            step, reports = self._share_state(_NEWCOMER, ())
        else:
            step, reports = self._share_state(loop.step, loop.reports)
        self._t.replicated.connect(alike=True)
        self._inbox.enter(order)
        return Entry(order=order, step=step, reports=reports)

    def _share_state(self, step: int, reports: Sequence[StepReport]) -> tuple[int, Sequence[StepReport]]:
        """Bring every rank to the highest step among them; returns it, with the last reports of who was there."""
        own = torch.tensor([step, 0 if step == _NEWCOMER else digest(self._t.parts.model)])
        table = own.new_zeros(dist.get_world_size(), 2)
        table[self.rank] = own
        dist.all_reduce(table)
        highest = int(table[:, 0].max())
        source = int(table[:, 0].argmax())
        if highest == _NEWCOMER:
            raise RunFailed("no rank of the group has the state of training: go on from a checkpoint with --resume")
        if bool((table == table[source]).all()):
            return step, reports
        is_missing = not torch.equal(table[self.rank], table[source])
        reports = send_state(self._t.parts.model, self._t.optimizer, reports, source=source, is_missing=is_missing)
        return highest, reports

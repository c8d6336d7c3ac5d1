"""How much of a device activations may use, now and as it changes."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import final

import torch

from revdist.config import RunConfig
from revdist.devices.device import Device
from revdist.devices.reading import Reading
from revdist.errors import DeviceError
from revdist.planning.policy import Keep, Replan, Rules, Standing, budget_of, decide
from revdist.training.local_planner import LocalPlanner

_log = logging.getLogger(__name__)


@final
class MemoryView:
    """Turns readings of a device into the budget of this process's activations."""

    def __init__(self, config: RunConfig, device: Device, *, fixed_bytes: int) -> None:
        self._config = config
        self._device = device
        self._fixed_bytes = fixed_bytes
        self.last: Reading = device.read()

    def budget_bytes(self) -> int:
        """What activations may use, from a fresh reading, which `last` keeps. Raises DeviceError."""
        self.last = reading = self._device.read()
        allocated, reserved = self._own_bytes(reading)
        return budget_of(
            reading.free_bytes,
            reserved,
            allocated,
            margin_bytes=self._config.memory.margin,
            fragmentation=self._config.memory.fragmentation,
            activation_bytes=max(0, allocated - self._fixed_bytes),
            pending_bytes=max(0, self._fixed_bytes - allocated),
            limit_bytes=self._config.memory.budget,
        )

    def _own_bytes(self, reading: Reading) -> tuple[int, int]:
        """Bytes this process has in tensors, and bytes its allocator holds of the device."""
        if self._device.kind == "cuda":
            index = self._device.torch_device
            return torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
        # The reading's own figure is of the same moment as its free bytes; the step goes on meanwhile.
        own = next((holder.used_bytes for holder in reading.holders if holder.pid == os.getpid()), None)
        allocated = self._device.meter().allocated_bytes() if own is None else own
        return allocated, allocated


_LOOK_S = 0.005
"""Pause between looks for the first step."""


@final
class MemoryWatch:
    """Reads the device beside the training thread and replans when its memory changes."""

    def __init__(
        self,
        config: RunConfig,
        view: MemoryView,
        planner: LocalPlanner,
        *,
        need_bytes: Callable[[], int],
        replanned: Callable[[str], None],
        lost: Callable[[DeviceError], None],
        has_begun: Callable[[], bool] = lambda: True,
    ) -> None:
        """need_bytes: what the plan in force needs. replanned: called with the reason after each replan.
        lost: called when the device no longer answers; the watch ends then. has_begun: whether the first
        step has been taken, which loading the solver would only make later.
        """
        self._every_s = config.replan.every_s
        self._rules = Rules(min_change=config.replan.min_change, settle_s=config.replan.settle_s, patience_s=math.inf)
        self._view = view
        self._planner = planner
        self._need_bytes = need_bytes
        self._replanned = replanned
        self._lost = lost
        self._has_begun = has_begun
        self._standing: Standing | None = None
        self._seen_version = -1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="revdist-memory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the watch and wait for it."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, now_s: float) -> None:
        """Take one reading and act on it."""
        decision = decide(self._current_standing(), self._view.budget_bytes(), now_s, self._rules)
        match decision:
            case Keep(standing):
                self._standing = standing
            case Replan(budget_bytes, reason):
                self._planner.replan(budget_bytes, reason=reason)
                self._replanned(reason)
            case _:
                raise AssertionError("with endless patience the policy never stops a run")

    def _current_standing(self) -> Standing:
        if self._standing is None or self._planner.version != self._seen_version:
            self._seen_version = self._planner.version
            self._standing = Standing(
                budget_bytes=self._planner.budget_bytes,
                need_bytes=self._need_bytes(),
                minimum_bytes=self._planner.minimum_bytes,
            )
        return self._standing

    def solve(self) -> None:
        """Replace the first plan, which was made without the solver, by the best one."""
        self._planner.replan(self._view.budget_bytes(), reason="profile")
        self._replanned("profile")

    def _run(self) -> None:
        try:
            while not self._has_begun():
                if self._ended.wait(_LOOK_S):
                    return
            self.solve()
            while not self._ended.wait(self._every_s):
                self.look(time.monotonic())
        except DeviceError as error:
            self._lost(error)

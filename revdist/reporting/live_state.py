"""What a running run looks like at this moment: fed by the observer, drawn by the screens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revdist.devices.reading import Reading
from revdist.planning.costs import Plan

SMOOTHING = 0.2
"""Weight of the newest step in the rates shown: about the last ten steps count."""


@dataclasses.dataclass(slots=True)
class RankState:
    """One line of the live table; None: not known yet."""

    rank: int
    uuid: str
    device: str
    """Name of the device; with its host where the run spans several."""
    local_rank: int = 0
    """Its number among the ranks of its host."""
    free_bytes: int | None = None
    plan: Plan | None = None
    peak_bytes: int | None = None
    samples_per_s: float | None = None
    profiled: tuple[int, int] | None = None
    """Measurements taken, of how many."""
    lost: bool = False


@dataclasses.dataclass(slots=True)
class RunState:
    """The whole run as far as it has been told."""

    name: str
    total_steps: int | None = None
    run_dir: Path | None = None
    ranks: dict[int, RankState] = dataclasses.field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    loss: float | None = None
    samples_per_s: float | None = None
    step_s: float | None = None
    _devices: dict[str, RankState] = dataclasses.field(default_factory=dict)
    """By UUID: those of the ranks, and those of which something was told before they have one."""
    _names: dict[str, str] = dataclasses.field(default_factory=dict)
    """By UUID: names of all devices that ever had a rank."""

    def start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        self.run_dir = run_dir
        self._devices.clear()
        self.regroup(devices)

    def regroup(self, devices: Sequence[Reading]) -> None:
        """Enter who has which rank from now on: those that were lost vanish, devices known already keep their state."""
        known, self._devices = self._devices, {}
        several_hosts = len({reading.host for reading in devices}) > 1
        on_host: Counter[str] = Counter()
        self.ranks.clear()
        for rank, reading in enumerate(devices):
            name = f"{reading.name}@{reading.host}" if several_hosts else reading.name
            state = known.get(reading.uuid) or RankState(rank, reading.uuid, name, free_bytes=reading.free_bytes)
            state.rank, state.device, state.local_rank, state.lost = rank, name, on_host[reading.host], False
            self.ranks[rank] = self._devices[reading.uuid] = state
            self._names[reading.uuid] = name
            on_host[reading.host] += 1

    def rank(self, rank: int, device: str) -> RankState:
        """The state of a device, by its UUID: ranks are given anew before it is told who has which.

        One that is not known yet gets the rank, if that is free: newcomers have one below zero until they join.
        """
        if device not in self._devices:
            name = self._names.get(device, device[:12])
            self._devices[device] = state = RankState(rank, device, name)
            self.ranks.setdefault(rank, state)
        return self._devices[device]

    def lose(self, rank: int | None, device: str) -> None:
        """A replica is gone: its row is struck out until the others have regrouped. A newcomer's row vanishes."""
        state = self._devices.get(device) or self.ranks.get(-1 if rank is None else rank)
        if state is None:
            return
        state.lost = True
        if state.rank < 0:
            self.ranks.pop(state.rank, None)
            self._devices.pop(state.uuid, None)

    def name_of(self, rank: int | None, uuid: str = "") -> str:
        """The name of a device, known by its UUID, or by its rank; empty: what happened concerns no single device."""
        state = self._devices.get(uuid) or (None if rank is None else self.ranks.get(rank))
        return uuid if state is None else state.device

    def adopt(self, plan: Plan, free_bytes: int | None) -> Plan | None:
        """Enter a plan and return the one it replaces."""
        state = self.rank(plan.rank, plan.device)
        before, state.plan, state.free_bytes = state.plan, plan, free_bytes
        state.profiled, state.lost = None, False
        return before

    def advance(self, metrics: Mapping[str, Any]) -> None:
        """Enter one line of metrics.jsonl."""
        self.step = int(metrics["step"])
        self.epoch = int(metrics.get("epoch", self.epoch))
        self.loss = metrics.get("loss")
        self.step_s = _smooth(self.step_s, metrics.get("step_s"))
        self.samples_per_s = _smooth(self.samples_per_s, metrics.get("samples_per_s"))
        for line in metrics.get("ranks", ()):
            state = self.rank(line["rank"], str(line.get("device", "")))
            state.free_bytes = line.get("free_bytes", state.free_bytes)
            state.peak_bytes = line.get("peak_bytes", state.peak_bytes)
            step_s = metrics.get("step_s") or 0
            if step_s > 0 and "samples" in line:
                state.samples_per_s = _smooth(state.samples_per_s, line["samples"] / step_s)

    @property
    def profiling(self) -> bool:
        return any(state.profiled is not None for state in self.ranks.values())

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the last step at the present pace; None where either is unknown."""
        if self.total_steps is None or self.step_s is None:
            return None
        return max(0, self.total_steps - self.step) * self.step_s


def _smooth(old: float | None, new: float | None) -> float | None:
    if new is None or old is None:
        return new if old is None else old
    return old + SMOOTHING * (new - old)

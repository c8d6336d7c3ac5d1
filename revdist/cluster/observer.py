"""What a run tells whoever watches it: the live view, a notebook, a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from revdist.devices.reading import Reading
    from revdist.planning.costs import Plan


class Observer:
    """Called by the controller, one call at a time, from the thread that runs `Trainer.fit`.

    Subclass it and override what you need: every method does nothing by default. A call should
    return soon: the controller waits for it (training does not). What a method raises ends the run.
    Order: `on_start`, then any number of `on_profile`, then `on_plan` per rank, then steps, plans
    and events as they come, then `on_end` if the run came to its end.
    """

    def on_start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        """The devices are chosen, one reading per rank; nothing has been written to `run_dir` yet."""

    def on_profile(self, rank: int, device: str, done: int, total: int) -> None:
        """`done` of `total` measurements are taken on the device of `rank` (`device` is its UUID)."""

    def on_plan(self, plan: Plan, free_bytes: int) -> None:
        """A rank adopted a plan; `free_bytes` is what its device had free at that time."""

    def on_regroup(self, devices: Sequence[Reading]) -> None:
        """Replicas were lost or joined: one reading per rank, in their new order. A plan per rank follows."""

    def on_log(self, rank: int, text: str) -> None:
        """What the process of a rank printed: whole lines."""

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """A step is done: one line of metrics.jsonl (`revdist.training.run_directory`)."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Something happened: one line of events.jsonl."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is done: what summary.json holds."""


@final
class Observers(Observer):
    """Several observers as one, told in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        for observer in self._observers:
            observer.on_start(run_dir, devices)

    def on_profile(self, rank: int, device: str, done: int, total: int) -> None:
        for observer in self._observers:
            observer.on_profile(rank, device, done, total)

    def on_plan(self, plan: Plan, free_bytes: int) -> None:
        for observer in self._observers:
            observer.on_plan(plan, free_bytes)

    def on_regroup(self, devices: Sequence[Reading]) -> None:
        for observer in self._observers:
            observer.on_regroup(devices)

    def on_log(self, rank: int, text: str) -> None:
        for observer in self._observers:
            observer.on_log(rank, text)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.on_step(metrics)

    def on_event(self, event: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.on_event(event)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.on_end(summary)

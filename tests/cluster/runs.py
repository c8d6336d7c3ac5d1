"""Short runs of a small model on CPU devices, and what a test sees of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from revdist.cluster.observer import Observer
from revdist.devices.reading import Reading
from revdist.planning.costs import Plan


def settings(*, capacities: Sequence[str] = ("64MiB", "64MiB"), **changes: Any) -> dict[str, Any]:
    """A run on one CPU device per capacity; the test names what is different."""
    return {
        "name": "small",
        "model": {"factory": "small_models:classifier"},
        "data": {"factory": "small_models:images"},
        "global_batch": 10,
        "epochs": 2,
        "devices": [
            {"kind": "cpu", "name": f"cpu-{number}", "capacity": capacity} for number, capacity in enumerate(capacities)
        ],
        "planning": {"profile_repeats": 1, "profile_cache": False},
        "replan": {"every_s": 0.05, "settle_s": 0.1},
        **changes,
    }


def cpu_reading(name: str, *, uuid: str, host: str, index: int = 0) -> Reading:
    """A reading of a CPU device whose bytes do not matter."""
    return Reading(
        uuid=uuid,
        name=name,
        kind="cpu",
        index=index,
        host=host,
        total_bytes=9,
        free_bytes=9,
        used_bytes=0,
        time_s=0,
    )


class Watcher(Observer):
    """Remembers every call, and lets the test act after a step."""

    def __init__(self, after_step: Callable[[int], None] | None = None) -> None:
        self.calls: list[str] = []
        self.run_dir: Path | None = None
        self.devices: Sequence[Any] = ()
        self.plans: list[Plan] = []
        self.steps: list[Mapping[str, Any]] = []
        self.events: list[Mapping[str, Any]] = []
        self.summary: Mapping[str, Any] = {}
        self._after_step = after_step

    def on_start(self, run_dir: Path, devices: Sequence[Any]) -> None:
        self.calls.append("start")
        self.run_dir, self.devices = run_dir, devices

    def on_profile(self, rank: int, device: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.calls.append("profile")

    def on_plan(self, plan: Plan, free_bytes: int) -> None:
        self.calls.append("plan")
        self.plans.append(plan)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.calls.append("step")
        self.steps.append(metrics)
        if self._after_step is not None:
            self._after_step(metrics["step"])

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.calls.append("end")
        self.summary = summary

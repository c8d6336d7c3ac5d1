"""The run as Ray metrics, which Ray offers to Prometheus on every host, per replica.

    ray_revdist_step, ray_revdist_samples_per_s, ray_revdist_share, ray_revdist_generation,
    ray_revdist_budget_bytes, ray_revdist_peak_bytes, ray_revdist_free_bytes,
    ray_revdist_pauses_total, ray_revdist_pause_s_total

Each has the tags `run`, `rank` and `device`. They are set by the process that supervises the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from ray.util.metrics import Counter, Gauge

from revdist.cluster.observer import Observer

if TYPE_CHECKING:
    from revdist.devices.reading import Reading

_EVERY_S = 1.0
"""Gauges are set this often: Ray collects them every few seconds."""
_TAGS = ("run", "rank", "device")
_GAUGES = {
    "step": "Steps that the run has taken",
    "samples_per_s": "Samples of this replica's share per second of step time",
    "share": "Samples of every global batch that this replica takes",
    "generation": "Generation of the plan in force",
    "budget_bytes": "Bytes that activations may use on the device",
    "peak_bytes": "Most bytes allocated during the last step",
    "free_bytes": "Free memory of the device at its last reading",
}


@final
class RunMetrics(Observer):
    """Sets the metrics of one run."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._gauges = {key: Gauge(f"revdist_{key}", about, _TAGS) for key, about in _GAUGES.items()}
        self._pauses = Counter("revdist_pauses", "Steps during which this replica had to wait or start anew", _TAGS)
        self._pause_s = Counter("revdist_pause_s", "Seconds of such waiting", _TAGS)
        self._names: dict[str, str] = {}
        self._tags: dict[int, dict[str, str]] = {}
        self._set_at_s = float("-inf")
        self._last: Mapping[str, Any] | None = None

    def on_start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        self._names = {reading.uuid: reading.name for reading in devices}

    def on_regroup(self, devices: Sequence[Reading]) -> None:
        """Ray forgets no gauge: those of ranks that are gone, or go on elsewhere, are set to zero."""
        self.on_start(Path(), devices)
        for tags in self._tags.values():
            for gauge in self._gauges.values():
                gauge.set(0.0, tags)
        self._tags.clear()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._last = metrics
        if metrics.get("pause_s"):
            for rank in metrics["ranks"]:
                self._pauses.inc(1.0, self._tags_of(rank))
                self._pause_s.inc(metrics["pause_s"], self._tags_of(rank))
        if self._clock() - self._set_at_s >= _EVERY_S:
            self._set(metrics)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        if self._last is not None:
            self._set(self._last)

    def _set(self, metrics: Mapping[str, Any]) -> None:
        self._set_at_s = self._clock()
        for rank in metrics["ranks"]:
            values = {**rank, "step": metrics["step"], "samples_per_s": rank["samples"] / metrics["step_s"]}
            for key, gauge in self._gauges.items():
                gauge.set(float(values[key]), self._tags_of(rank))

    def _tags_of(self, rank: Mapping[str, Any]) -> dict[str, str]:
        number, device = int(rank["rank"]), str(rank["device"])
        if number not in self._tags:
            name = self._names.get(device, device)
            self._tags[number] = {"run": self._name, "rank": str(number), "device": name}
        return self._tags[number]

"""The run as Ray metrics: what is set, and what Prometheus reads during a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from runs import cpu_reading, settings

import revdist
from revdist.cluster import metrics
from revdist.cluster.run_record import read_record
from revdist.devices.reading import Reading

ROOT = Path(revdist.__file__).parent.parent


class Recorder:
    """Takes the place of Ray's gauges and counters."""

    values: dict[tuple[str, str], float] = {}

    def __init__(self, name: str, about: str, tags: tuple[str, ...]) -> None:
        assert about
        assert tags == ("run", "rank", "device")
        self._name = name

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.values[self._name, ",".join(tags.values())] = value

    def inc(self, value: float, tags: Mapping[str, str]) -> None:
        key = self._name, ",".join(tags.values())
        self.values[key] = self.values.get(key, 0.0) + value


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    values: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(Recorder, "values", values)
    monkeypatch.setattr(metrics, "Gauge", Recorder)
    monkeypatch.setattr(metrics, "Counter", Recorder)
    return values


def reading(name: str) -> Reading:
    return cpu_reading(name, uuid=f"CPU-{name}", host="h")


def step(number: int, *devices: str, pause_s: float = 0.0) -> dict[str, Any]:
    ranks = [
        {
            "rank": rank,
            "device": f"CPU-{device}",
            "share": 12 * (rank + 1),
            "samples": 10 * (rank + 1),  # as an epoch's last step has fewer
            "generation": 3,
            "budget_bytes": 100,
            "peak_bytes": 90,
            "free_bytes": 120,
        }
        for rank, device in enumerate(devices)
    ]
    return {"step": number, "step_s": 0.5, "pause_s": pause_s, "ranks": ranks}


def test_gauges_follow_the_steps_but_not_each_of_them(recorded: dict[tuple[str, str], float]) -> None:
    now = [0.0]
    observer = metrics.RunMetrics("mine", clock=lambda: now[0])
    observer.on_start(Path(), [reading("a"), reading("b")])
    observer.on_step(step(1, "a", "b"))
    assert recorded["revdist_budget_bytes", "mine,0,a"] == 100
    assert recorded["revdist_samples_per_s", "mine,1,b"] == 40
    assert recorded["revdist_generation", "mine,1,b"] == 3
    observer.on_step(step(2, "a", "b", pause_s=0.25))
    assert recorded["revdist_step", "mine,0,a"] == 1
    now[0] = 1.5
    observer.on_step(step(3, "a", "b", pause_s=0.5))
    assert recorded["revdist_step", "mine,0,a"] == 3
    assert recorded["revdist_pauses", "mine,1,b"] == 2
    assert recorded["revdist_pause_s", "mine,1,b"] == 0.75
    observer.on_step(step(4, "a", "b"))
    observer.on_end({})
    assert recorded["revdist_step", "mine,0,a"] == 4


def test_who_is_gone_counts_no_more(recorded: dict[tuple[str, str], float]) -> None:
    observer = metrics.RunMetrics("mine", clock=lambda: 0.0)
    observer.on_start(Path(), [reading("a"), reading("b")])
    observer.on_step(step(1, "a", "b"))
    observer.on_regroup([reading("b"), reading("c")])
    observer.on_step(step(2, "b", "c", pause_s=0.1))
    observer.on_end({})
    assert recorded["revdist_peak_bytes", "mine,0,a"] == 0
    assert recorded["revdist_peak_bytes", "mine,1,b"] == 0
    assert recorded["revdist_peak_bytes", "mine,0,b"] == 90
    assert recorded["revdist_step", "mine,1,c"] == 2


def scrape(url: str) -> dict[tuple[str, str, str, str], float]:
    """Our samples at a Prometheus endpoint, by name, run, rank and device."""
    assert url.startswith("http://127.0.0.1:")
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    return {
        (sample.name, sample.labels["run"], sample.labels["rank"], sample.labels["device"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_revdist_")
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prometheus_reads_them_from_ray_s_node_during_a_real_run(tmp_path: Path, devices_folder: Path) -> None:
    config, run_dir = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(json.dumps(settings(epochs=20_000)))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "training"), str(ROOT)]),
        "RAY_metrics_report_interval_ms": "500",
    }
    command = [sys.executable, "-m", "revdist.cli", "launch", str(config), "--run-dir", str(run_dir)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        samples: dict[tuple[str, str, str, str], float] = {}
        gauges = ("step", "samples_per_s", "share", "generation", "budget_bytes", "peak_bytes", "free_bytes")
        wanted = {(f"ray_revdist_{name}", "small", rank, f"cpu-{rank}") for name in gauges for rank in ("0", "1")}
        until_s = time.monotonic() + 120
        while not wanted <= set(samples) and time.monotonic() < until_s:
            assert process.poll() is None, process.communicate()[0].decode()
            record = read_record(run_dir) if run_dir.exists() else None
            if record is not None and record.metrics_url and record.state == "running":
                try:
                    samples = scrape(record.metrics_url)
                except urllib.error.URLError:
                    samples = {}
            time.sleep(0.3)
        for rank in ("0", "1"):
            where = ("small", rank, f"cpu-{rank}")
            assert samples["ray_revdist_step", *where] >= 1
            assert samples["ray_revdist_samples_per_s", *where] > 0
            assert 0 < samples["ray_revdist_peak_bytes", *where] <= 64 * 2**20
            assert 0 < samples["ray_revdist_budget_bytes", *where] <= 64 * 2**20
            assert samples["ray_revdist_generation", *where] >= 0
        assert sum(samples["ray_revdist_share", "small", rank, f"cpu-{rank}"] for rank in ("0", "1")) == 10
    finally:
        process.terminate()
        process.communicate(timeout=120)

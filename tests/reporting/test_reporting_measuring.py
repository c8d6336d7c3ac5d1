"""`revdist plan CONFIG` on a real model: what it predicts is what a step takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from revdist.reporting.profile_files import read_profiles

CONFIG = """\
model: {factory: "revdist.models:revnet_digits"}
data: {factory: "revdist.training.datasets:digits"}
global_batch: 16
micro_batch: 8
steps: 1
devices: [{kind: cpu, capacity: 6MiB}]
planning: {profile_repeats: 1, profile_cache: false, modes: [SAVE, INVERT]}
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_plan_is_measured_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG)
    command = ["plan", "small.yaml", "--measure", "--export", "small.json", "--out", "small.png"]
    done = subprocess.run(
        [sys.executable, "-m", "revdist.cli", *command], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    said = re.search(r"Measured peak at .*?: ([\d.]+) (\w+), predicted ([\d.]+) (\w+) \(([+-][\d.]+)%\)", text)
    assert said is not None, text
    assert abs(float(said[5])) <= 3
    (profile,) = read_profiles(tmp_path / "small.json")
    assert profile.micro_batch == 8
    assert (tmp_path / "small.png").stat().st_size > 10_000


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(CONFIG)
    command = ["plan", "small.yaml", "model.factory=nowhere:net"]
    done = subprocess.run(
        [sys.executable, "-m", "revdist.cli", *command], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "cannot import nowhere:net" in done.stderr

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_run import MIB, write_run

from revdist.errors import UsageError
from revdist.reporting.history import read_history
from revdist.reporting.run_figures import fixed_bytes


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=30))
    assert history.name == "sample"
    assert history.ranks == (0, 1)
    assert len(history.metrics) == 30
    assert [plan["reason"] for plan in history.plans_of(1)] == ["start", "memory-lost", "memory-gained"]
    assert len(history.steps_of(0)) == 30
    assert history.end_s - history.start_s == pytest.approx(3.0)
    assert history.summary is not None


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=30, finished=False))
    assert len(history.metrics) == 29
    assert history.summary is None


@pytest.mark.parametrize(
    ("config", "name"),
    [("name: old\na_key_of_before: 1\n", "old"), ("steps: 3\n", "run"), ("[1]", "run"), ("{name: \xff", "run")],
)
def test_the_configuration_of_another_version_is_shown_as_it_stands(tmp_path: Path, config: str, name: str) -> None:
    run_dir = write_run(tmp_path / "run", steps=3)
    (run_dir / "config.yaml").write_text(config)
    history = read_history(run_dir)
    assert (history.name, history.config) == (name, config)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_what_is_not_a_run_directory_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="run directory"):
        read_history(tmp_path / place)


def test_the_fixed_part_of_a_peak_follows_the_plan_of_its_step(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps=30))
    assert np.array_equal(fixed_bytes(history.plans_of(1), [1, 10, 25]), [3 * MIB] * 3)
    assert np.array_equal(fixed_bytes([], [1, 2]), [0, 0])

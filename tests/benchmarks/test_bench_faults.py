"""What the comparison of launchers counts as a pause and as a lost step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.recovery.result import Finding, cell
from benchmarks.recovery.watching import MARK, Pause, Step, end, pause, pid_of_log, steps_of_logs

STEP_S = 0.02


def steady(first: int, last: int, *, begin_s: float) -> list[Step]:
    return [Step(begin_s + STEP_S * (number - first), number) for number in range(first, last + 1)]


def test_training_that_goes_on_pauses_for_the_gap_less_a_step_and_loses_nothing() -> None:
    steps = steady(1, 50, begin_s=0.0) + steady(51, 99, begin_s=3.0)
    found = pause(steps, fault_s=0.985)
    assert found is not None
    assert found.seconds == pytest.approx(3.0 - 49 * STEP_S - STEP_S)
    assert found.steps_lost == 0


def test_training_that_goes_back_to_a_checkpoint_loses_what_it_takes_again() -> None:
    """Also the steps that others took after the fault and before they stopped."""
    steps = steady(1, 57, begin_s=0.0) + steady(51, 99, begin_s=9.0)
    found = pause(steps, fault_s=STEP_S * 54)
    assert found is not None
    assert found.steps_lost == 7


def test_two_ranks_that_write_down_the_same_steps_lose_none() -> None:
    both = sorted([*steady(1, 90, begin_s=0.0), *steady(1, 90, begin_s=0.001)])
    found = pause(both, fault_s=1.0)
    assert found is not None
    assert found.steps_lost == 0
    assert found.seconds < STEP_S


def test_there_is_no_pause_to_tell_before_steps_go_on() -> None:
    assert pause(steady(1, 50, begin_s=0.0), fault_s=2.0) is None


def test_a_cell_says_the_range_the_median_and_what_never_went_on() -> None:
    def finding(what: Pause | None) -> Finding:
        return Finding(subject="one", fault="kill", pause=what, limit_s=45)

    pauses = [Pause(seconds=seconds, steps_lost=lost) for seconds, lost in ((0.5, 0), (2.0, 4), (1.0, 2))]
    assert cell([finding(one) for one in pauses]) == "0.50-2.00 s, 2 steps"
    assert cell([finding(pauses[0]), finding(None)]) == "0.50 s, 0 steps (1 of 2 never)"
    assert cell([finding(None)]) == "not in 45 s"
    assert cell([]) == "-"


def test_logs_of_all_processes_are_read_by_time_and_a_half_written_line_is_not(tmp_path: Path) -> None:
    (tmp_path / "steps-0-11.log").write_text("1 10.0\n3 12.0\n")
    (tmp_path / "steps-1-12.log").write_text("2 11.0\n4")
    assert steps_of_logs(tmp_path) == [Step(10.0, 1), Step(11.0, 2), Step(12.0, 3)]
    assert pid_of_log(tmp_path, 1) == 12


def test_the_end_of_a_job_finds_processes_that_left_its_tree(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    mine = subprocess.Popen(sleep, env={**os.environ, MARK: str(tmp_path)}, start_new_session=True)
    other = subprocess.Popen(sleep, env={**os.environ, MARK: "another"})
    try:
        end(str(tmp_path))
        assert mine.poll() is not None
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()

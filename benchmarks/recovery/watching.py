"""What is seen of a training from outside: the steps it took, and its end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

MARK = "REVDIST_BENCH_JOB"
"""In the environment of all processes of one job, so that those that left its process tree are found too."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Step:
    """A step that some rank has completed."""

    time: float
    number: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """What a fault cost."""

    seconds: float
    """Longest time around the fault in which no step was completed, less a usual step."""
    steps_lost: int
    """Steps that had been taken before and were taken again."""


def steps_of_logs(folder: Path) -> list[Step]:
    """What the ranks of `Training` have written down, by time."""
    steps = []
    for path in folder.glob("steps-*.log"):
        for line in path.read_text(encoding="utf-8").splitlines():
            number, _, when = line.partition(" ")
            if when:
                steps.append(Step(float(when), int(number)))
    return sorted(steps)


def pid_of_log(folder: Path, rank: int) -> int:
    """Of the newest process that took steps as this rank."""
    paths = sorted(folder.glob(f"steps-{rank}-*.log"), key=lambda path: path.stat().st_mtime)
    return int(paths[-1].stem.rpartition("-")[2])


def pause(steps: Sequence[Step], fault_s: float) -> Pause | None:
    """The pause that began about when the fault happened; None where there are not steps on both sides yet."""
    before = [step for step in steps if step.time <= fault_s]
    after = [step for step in steps if step.time > fault_s]
    if len(before) < 2 or len(after) < 2:
        return None
    times = [step.time for step in (before[-1], *after)]
    gap_s, number = max((later - earlier, number) for number, (earlier, later) in enumerate(itertools.pairwise(times)))
    reached = max(step.number for step in (*before, *after[:number]))
    resumed = min(step.number for step in after[number:])
    usual = _usual_step_s(before)
    return Pause(seconds=max(0.0, gap_s - usual), steps_lost=max(0, reached - resumed + 1) if gap_s > 5 * usual else 0)


def _usual_step_s(steps: Sequence[Step]) -> float:
    """Median time between completions of different steps."""
    first: dict[int, float] = {}
    for step in steps:
        first.setdefault(step.number, step.time)
    times = sorted(first.values())
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    return gaps[len(gaps) // 2] if gaps else 0.0


def wait_for(condition: Callable[[], bool], *, patience_s: float) -> bool:
    """Whether it came true in time."""
    until_s = time.monotonic() + patience_s
    while time.monotonic() < until_s:
        if condition():
            return True
        time.sleep(0.02)
    return False


def processes(mark: str) -> list[psutil.Process]:
    """Every process of a job but this one."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_of(process, mark)]


def end(mark: str) -> None:
    """Kill every process of a job, also those that are stopped or have left its tree, and wait for them."""
    mine = processes(mark)
    for process in mine:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(mine, timeout=10)


def _is_of(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False

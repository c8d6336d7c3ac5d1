"""A training that has the machine to itself for a few seconds at a time, and is stopped while another has it."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from benchmarks.recovery.watching import MARK, end, processes

_LOOK_S = 0.25
"""Between looks at a training that warms up: it must warm up as it will run, by itself."""
_PATIENCE_S = 180.0
"""For the next step of a training that warms up: the first one waits for imports and a profile."""
_LEAST_STEPS = 3
"""Steps in a turn below which it tells nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Feed:
    """Where one training writes when it has completed each of its steps."""

    path: Path
    samples: int
    """Of a step."""
    as_json: bool = False

    def num_steps(self) -> int:
        """Completed, without a look at when."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def times(self) -> list[float]:
        """Seconds since the epoch, one a step; half a line at the end is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return [float(json.loads(line)["time"]) if self.as_json else float(line) for line in whole]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a job did while it had the machine."""

    samples_per_s: float
    steps: int
    """Completed, by the slowest of its trainings."""
    began_s: float
    """Seconds since the epoch."""
    ended_s: float


class Job:
    """All processes that one command started, found by a mark in their environment. Use as a context manager."""

    def __init__(
        self, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], feeds: Sequence[Feed], *,
        every_look: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """commands: with the environment of each. every_look: called while it warms up, as it may need to be pinned."""
        self.feeds = tuple(feeds)
        self._mark = uuid.uuid4().hex
        self._every_look = every_look
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed on exit
        self._started = [
            subprocess.Popen(command, env={**environment, MARK: self._mark}, stdout=self._log, stderr=self._log)
            for command, environment in commands
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it save and leave, then end what is left."""
        self._send(signal.SIGCONT)
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                continue
        end(self._mark)
        for process in self._started:
            process.wait()
        self._log.close()

    def warm_up(self, steps: int) -> None:
        """Let it run alone until it has completed so many steps, then stop it.

        Raises SystemExit with what it printed where it ends or stands still.
        """
        taken, until_s = 0, time.monotonic() + _PATIENCE_S
        while (now := min(feed.num_steps() for feed in self.feeds)) < steps:
            if now > taken:
                taken, until_s = now, time.monotonic() + _PATIENCE_S
            if any(process.poll() is not None for process in self._started) or time.monotonic() > until_s:
                raise SystemExit(f"not {steps} steps: {self._started[0].args}\n{self._output()}")
            self._every_look()
            time.sleep(_LOOK_S)
        self._send(signal.SIGSTOP)

    def turn(self, seconds: float, *, meanwhile: Callable[[], None] = lambda: None) -> Turn:
        """Let it run for a while. Counted are the steps that began and ended in it. meanwhile: called at its begin.

        Raises SystemExit where it ended, or took fewer steps than tell anything.
        """
        began_s = time.time()
        self._send(signal.SIGCONT)
        meanwhile()
        time.sleep(seconds)
        self._send(signal.SIGSTOP)
        ended_s = time.time()
        rates, counts = [], []
        for feed in self.feeds:
            times = [when for when in feed.times() if began_s <= when <= ended_s]
            if len(times) < _LEAST_STEPS:
                raise SystemExit(f"{len(times)} steps in {seconds:g} s: {self._started[0].args}\n{self._output()}")
            rates.append(feed.samples * (len(times) - 1) / (times[-1] - times[0]))
            counts.append(len(times))
        return Turn(samples_per_s=sum(rates), steps=min(counts), began_s=began_s, ended_s=ended_s)

    def _send(self, number: signal.Signals) -> None:
        for process in processes(self._mark):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read()[-5000:]

"""A run directory read while it grows: what is there, then what comes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, final

from revdist.cluster.observer import Observer
from revdist.devices.reading import Reading
from revdist.errors import UsageError
from revdist.training.run_directory import plan_of, records

Line = Mapping[str, Any]

NAMES = ("plans", "events", "metrics")
"""In the order in which lines of one moment are told."""
_STEPS_BYTES = 256 * 2**10
"""Of the steps that are there already, the newest: as many as this holds."""

_SKEW_S = 5.0
"""Clocks of hosts may differ by this much: lines are stamped where they come from."""


def check_run_dir(run_dir: Path) -> None:
    """Raise UsageError where there is no such directory."""
    if not run_dir.is_dir():
        raise UsageError(f"no run directory {run_dir}; `revdist launch` says where it writes, runs/<name>-<time>")


@final
class GrowingLines:
    """The lines of a `.jsonl` file of a run, as far as they are whole, each once."""

    def __init__(self, path: Path, *, newest_bytes: int | None = None) -> None:
        """newest_bytes: skip what lies before so many bytes from the end; None: read all."""
        self._path = path
        self._newest_bytes = newest_bytes
        self._offset = 0
        self._last_line = b""
        """That ends there."""
        self._newest_s = float("-inf")

    def new(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                goes_on = self._goes_on(file)
                if not goes_on:
                    self._begin(file)
                block = file.read()
        except FileNotFoundError:
            return []
        block = block[: block.rfind(b"\n") + 1]
        if block:
            self._offset += len(block)
            self._last_line = block[block.rfind(b"\n", 0, -1) + 1 :]
        found = records(block.splitlines(keepends=True), self._path.stem)
        lines = [line for line in found if goes_on or line["time"] > self._newest_s]
        self._newest_s = max((line["time"] for line in lines), default=self._newest_s)
        return lines

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether what was read last is where it was: a run that is resumed cuts off steps that were lost."""
        file.seek(self._offset - len(self._last_line))
        return self._offset > 0 and file.read(len(self._last_line)) == self._last_line

    def _begin(self, file: BinaryIO) -> None:
        """Go to the first line that is to be read."""
        size = file.seek(0, os.SEEK_END)
        skipped = 0 if self._newest_bytes is None else max(0, size - self._newest_bytes)
        file.seek(skipped)
        self._last_line = file.readline() if skipped else b""  # may be a part of one
        self._offset = file.tell()


@final
class RunFollower:
    """Tells an observer what a run has written down, in the order in which it happened."""

    def __init__(self, run_dir: Path, observer: Observer) -> None:
        self._run_dir = run_dir
        self._observer = observer
        self._early: list[tuple[str, dict[str, Any]]] = []
        self._files = {
            name: GrowingLines(run_dir / f"{name}.jsonl", newest_bytes=_STEPS_BYTES if name == "metrics" else None)
            for name in NAMES
        }

    def catch_up(self) -> bool:
        """Tell of the newest session, as far as it has come; False where none has begun."""
        lines = self._early = [*self._early, *self._new()]
        starts = [number for number, (name, line) in enumerate(lines) if _is_start(name, line)]
        if not starts:
            return False
        self._early = []
        newest = lines[starts[-1]]
        self._tell(newest)
        for name, line in lines:
            if line["time"] >= newest[1]["time"] - _SKEW_S and not _is_start(name, line):
                self._tell((name, line))
        return True

    def tell_new(self) -> bool:
        """Tell of what was written since; False where nothing was."""
        lines = self._new()
        for line in lines:
            self._tell(line)
        return bool(lines)

    def _new(self) -> list[tuple[str, dict[str, Any]]]:
        lines = [(name, line) for name, file in self._files.items() for line in file.new()]
        return sorted(lines, key=lambda pair: float(pair[1]["time"]))

    def _tell(self, pair: tuple[str, Line]) -> None:
        name, line = pair
        if name == "plans":
            self._observer.on_plan(plan_of(line), int(line["free_bytes"]))
        elif name == "metrics":
            self._observer.on_step(line)
        else:
            if _is_start(name, line):
                self._observer.on_start(self._run_dir, readings_of(line["devices"]))
            elif line["kind"] == "regroup":
                self._observer.on_regroup(readings_of(line["devices"]))
            self._observer.on_event(line)


def _is_start(name: str, line: Line) -> bool:
    return name == "events" and line["kind"] == "start"


def readings_of(devices: Sequence[Line]) -> list[Reading]:
    """Devices as an event lists them, by rank: what they had free is told by their plans."""
    return [
        Reading(
            uuid=device["device"],
            name=device["name"],
            kind="cpu" if device["device"].startswith("CPU-") else "cuda",
            index=0,
            host=device["host"],
            total_bytes=device["total_bytes"],
            free_bytes=device["total_bytes"],
            used_bytes=0,
            time_s=time.time(),
        )
        for device in sorted(devices, key=lambda device: int(device["rank"]))
    ]

"""What ranks print, from the files of their processes to one file per rank beside the run, whatever host they are on.

Ray leads the output of a process to two files of its host, of everything that writes to it: user code, warnings,
logging, C++ libraries. A thread of the actor reads along and sends what is new as reports, so that no
file system need be shared and nothing is lost with a process on the supervisor's own host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, final

from revdist.cluster.observer import Observer
from revdist.training.reports import LogReport, Outbox

if TYPE_CHECKING:
    from revdist.devices.reading import Reading

_TICK_S = 0.25
TICK_BYTES = 64 * 2**10
"""Most that a rank sends per tick."""
_BACKLOG_BYTES = 2**20
"""A rank that has printed this much more than was sent skips to the end of it."""
_MAX_WAITING = 100
"""Reports waiting for a supervisor beyond which no output is added to them."""
_EARLY_BYTES = TICK_BYTES
"""Output kept until the run directory exists, or its process has a rank."""
_RAY_MARK = re.compile(rb"^:(job_id|actor_name|task_name):.*\n", flags=re.M)


def log_name(rank: int) -> str:
    return f"rank-{rank}.log"


@final
class Tail:
    """Reads what is new in files that grow, whole lines only."""

    def __init__(self, read_to: Mapping[str, int]) -> None:
        """read_to: by file, the bytes that need not be read again."""
        self.read_to = dict(read_to)

    @classmethod
    def of_this_process(cls) -> Tail:
        """The files that standard output and error of this process lead to, where they are files."""
        targets = {os.path.realpath(f"/proc/self/fd/{number}") for number in (1, 2)}
        return cls({path: 0 for path in sorted(targets, reverse=True) if os.path.isfile(path)})  # stdout first

    def read(self) -> str:
        """The next whole lines, some `TICK_BYTES` of them."""
        return "".join(self._read(path) for path in self.read_to)

    def read_all(self) -> str:
        """All that is left, of a long backlog its end."""
        return "".join(iter(self.read, ""))

    def _read(self, path: str) -> str:
        note = b""
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                behind = size - self.read_to[path]
                if behind > _BACKLOG_BYTES:
                    left_out = behind - TICK_BYTES
                    note = f"[{left_out} bytes left out here; {path} on {socket.gethostname()} has them]\n".encode()
                    self.read_to[path] += left_out
                file.seek(self.read_to[path])
                lines = _whole_lines(file.read(TICK_BYTES))
        except OSError:
            return ""
        self.read_to[path] += len(lines)
        return (note + _RAY_MARK.sub(b"", lines)).decode("utf-8", errors="replace")


def _whole_lines(block: bytes) -> bytes:
    """The block up to its last line end; all of it, where a single line is longer than the block may be."""
    end = block.rfind(b"\n") + 1
    return block[:end] if end or len(block) < TICK_BYTES else block


@final
class LogSender:
    """Sends what this process prints as reports, from a thread of its own."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._tail = Tail.of_this_process()

    def start(self) -> None:
        self._outbox.put(self._next())  # says where the files are, before anything can go wrong
        threading.Thread(target=self._run, name="revdist-logs", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_TICK_S)
            if self._outbox.waiting < _MAX_WAITING and (report := self._next()).text:
                self._outbox.put(report)

    def _next(self) -> LogReport:
        text = self._tail.read()
        return LogReport(text=text, host=socket.gethostname(), read_to=dict(self._tail.read_to))


def rest_of(report: LogReport) -> LogReport:
    """What its files hold beyond a report, on the host that has them."""
    tail = Tail(report.read_to)
    return dataclasses.replace(report, text=tail.read_all(), read_to=tail.read_to)


@final
class LogGatherer:
    """Tells an observer what ranks print, and the last words of those whose process is gone."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._newest: dict[int, LogReport] = {}
        self._waiting: dict[int, str] = {}

    def take(self, member: int, rank: int, report: LogReport) -> None:
        """rank: of the process with this number; -1: it has none yet, and what it prints is told once it has."""
        self._newest[member] = report
        text = self._waiting.pop(member, "") + report.text
        if text and rank < 0:
            self._waiting[member] = text[-_EARLY_BYTES:]
        elif text:
            self._observer.on_log(rank, text)

    @property
    def newest(self) -> Mapping[int, LogReport]:
        """By member: how far its output has been told."""
        return self._newest

    def lost(self, member: int, rank: int) -> None:
        """A process has ended: read the rest of its files, where they are on this host."""
        report = self._newest.pop(member, None)
        if report is not None and report.host == socket.gethostname():
            self.take(member, max(rank, 0), rest_of(report))


@final
class LogFiles(Observer):
    """Writes `rank-N.log` files. Nothing is on disk before the run has begun."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begun = False
        self._early: dict[int, str] = {}
        self._files: dict[int, TextIO] = {}

    def on_start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        self._begun = False

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] in ("start", "supervisor") and not self._begun:  # begun by this supervisor, or taken over
            self._begun = True
            early, self._early = self._early, {}
            for rank, text in early.items():
                self.on_log(rank, text)

    def on_log(self, rank: int, text: str) -> None:
        if not self._begun:
            self._early[rank] = (self._early.get(rank, "") + text)[-_EARLY_BYTES:]
            return
        with contextlib.suppress(OSError):  # a full disk: what ranks print is not worth a run
            file = self._file(rank)
            file.write(text if text.endswith("\n") else f"{text}\n")
            file.flush()

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

    def _file(self, rank: int) -> TextIO:
        if rank not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o750)
            path = self._folder / log_name(rank)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
            self._files[rank] = open(handle, "a", encoding="utf-8")  # noqa: SIM115 - kept open over the run
        return self._files[rank]

"""Processes of this host, told apart for good: a number alone is given again to another process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_STATE, _START_TICKS = 0, 19
"""Fields of /proc/PID/stat, counted after the command's name, which may hold blanks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of one boot of this host."""

    pid: int
    started: str
    """When it started, in ticks after which boot: no two processes of one number share it."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this number now; None where there is none, or only an uncollected dead one."""
        fields = _stat(pid)
        if fields is None or fields[_STATE] in ("Z", "X"):
            return None
        return cls(pid=pid, started=f"{_boot()}:{fields[_START_TICKS]}")

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> bool:
        """Signal this very process; False where it is gone, even if another one has its number."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive:
                return False
            signal.pidfd_send_signal(handle, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)


def own_process() -> Process:
    process = Process.of(os.getpid())
    assert process is not None
    return process


def started_with(name: str, value: str) -> list[Process]:
    """Living processes of this host, but not this one, that were started with a variable in their environment.

    Those of other users cannot be seen.
    """
    wanted = f"{name}={value}".encode()
    found = []
    for folder in _PROC.iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                process = Process.of(int(folder.name))
                if process is not None:
                    found.append(process)
    return found


def writing_below(folder: str) -> list[Process]:
    """Living processes of this host, but not this one, that have a file below a folder open.

    Ray's processes do, in the folder of their session. Those of other users cannot be seen.
    """
    found = []
    for process in _PROC.iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if any(os.readlink(link).startswith(f"{folder}/") for link in (process / "fd").iterdir()):
                living = Process.of(int(process.name))
                if living is not None:
                    found.append(living)
    return found


def _stat(pid: int) -> list[str] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]

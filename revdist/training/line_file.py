"""A file that grows by whole lines, also while its disk is full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

_MOST_BYTES = 64 * 2**20
"""Lines kept for a disk that takes none; the ones beyond are dropped."""


@final
class LineFile:
    """Appends lines. What the disk refuses waits in memory, in order, for the next line or the end."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened. Half a line, left by a process that died, is cut off."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._waiting = bytearray()
        self._cut_half_a_line()

    def append(self, line: str) -> None:
        """Append a line, given without its end. Never fails: a full disk must not end what the line tells of."""
        if len(self._waiting) < _MOST_BYTES:
            self._waiting += line.encode() + b"\n"
        self._write()

    def close(self) -> None:
        self._write()
        os.close(self._descriptor)

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError:
            return

    def _cut_half_a_line(self) -> None:
        end = os.fstat(self._descriptor).st_size
        position = end
        while position > 0:
            start = max(0, position - 2**16)
            found = os.pread(self._descriptor, position - start, start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < end:
            os.ftruncate(self._descriptor, position)

"""A thread beside a piece of work: it begins where that is entered, and is told to end where it is left."""

from __future__ import annotations

import abc
import threading
from types import TracebackType
from typing import Self


class Companion(abc.ABC):
    """Runs `_run` in a thread of its own while it is entered. The thread does not keep the process from ending."""

    def __init__(self, name: str, *, end_s: float = 0.0) -> None:
        """name: of the thread. end_s: longest wait for its end."""
        self._end_s = end_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=self._end_s)

    @abc.abstractmethod
    def _run(self) -> None:
        """Go on until `_ended` is set."""

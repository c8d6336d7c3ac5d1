"""Calls to the Ray head that a supervisor must not wait for: they block while the head is away.

A head that is gone for half a minute, and comes back, costs no step only if the supervisor goes on meanwhile:
other faults may come with this one, such as a replica on the same host.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar, final

T = TypeVar("T")


@final
class Errands:
    """Runs calls one after another in a thread, which does not keep the process from ending."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, call: Callable[[], T]) -> Future[T]:
        """Have a call made, after those sent before; what it returns or raises comes with the future."""
        future: Future[T] = Future()
        self._calls.put((call, future))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="revdist-errands", daemon=True)
            self._thread.start()
        return future

    def wait(self, timeout_s: float) -> bool:
        """Wait for all that was sent; whether that came to its end in time."""
        if self._thread is None:
            return True
        try:
            self.send(lambda: None).result(timeout=timeout_s)
        except TimeoutError:
            return False
        return True

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

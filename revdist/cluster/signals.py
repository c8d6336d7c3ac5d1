"""SIGINT and SIGTERM while a run trains: remembered, so that it can save before it leaves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import final

from revdist.errors import Preempted


@final
class StopRequest:
    """The signal that asked the run to stop, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> str | None:
        """Its name; None: train on."""
        return None if self.signal is None else self.signal.name


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request and leave a second one its usual effect.

    Handlers belong to the main thread: in any other one, signals keep their effect.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_at_start(reason: str, *, resumable: bool) -> Preempted:
    """The error of a run that is told to stop before the first step. resumable: there is a checkpoint to go on from."""
    what = "go on from the last checkpoint with --resume" if resumable else "no checkpoint was written"
    return Preempted(f"stopped by {reason} before the first step: {what}", signal=reason)

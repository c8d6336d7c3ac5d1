"""Calling a function in a process of its own, which may then crash, abort or hang.

The process is forked, so that libraries are imported once. Fork before anything has run a backward:
autograd's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

EXIT_S = 5.0
"""How long a process may take to end once it has given its result."""

_SOURCE = re.compile(r"\[/\S+\] ?")
"""Where in a library's source an error was raised, on the machine that built it."""

_fork = multiprocessing.get_context("fork")


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended: with a value, or with what went wrong in one line."""

    value: Any = None
    trouble: str = ""
    timed_out: bool = False


def call_isolated(function: Callable[[], Any], *, timeout_s: float) -> Ending:
    """`function()` in a forked process, ended with all that it started after `timeout_s` seconds.

    What it prints is kept from the terminal; the last line explains an abort.
    """
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed"
        receiver, sender = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_run, args=(function, sender, printed))
        process.start()
        sender.close()
        ending = _wait(receiver, timeout_s)
        if ending is None or not ending.timed_out:
            process.join(timeout=EXIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # it leads a group of its own
        process.join()
        return ending or _death(process.exitcode or 0, timeout_s, printed)


def _run(function: Callable[[], Any], sender: Connection, printed: Path) -> None:
    os.setpgid(0, 0)
    target = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        ending = Ending(function())
    except Exception as error:
        ending = Ending(trouble=_one_line(error))
        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        sender.send(ending)


def _wait(receiver: Connection, timeout_s: float) -> Ending | None:
    """The ending, or None where the process died or is still busy."""
    if not receiver.poll(timeout_s):
        return Ending(trouble=f"no end within {timeout_s:.0f} s", timed_out=True)
    try:
        ending: Ending = receiver.recv()
    except EOFError:
        return None
    return ending


def _death(exit_code: int, timeout_s: float, printed: Path) -> Ending:
    what = signal.strsignal(-exit_code) if exit_code < 0 else f"exit code {exit_code}"
    lines = printed.read_text(errors="replace").strip().splitlines() if printed.exists() else []
    last = f": {_SOURCE.sub('', lines[-1]).strip()[:120]}" if lines else ""
    return Ending(trouble=f"the process died: {what}{last}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"

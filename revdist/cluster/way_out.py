"""The end of a process that Ray would hold up.

Without the head of its cluster, Ray waits for it whenever a process wants to leave, and then ends the process with
an exit code of its own. Whoever reads that code, a script or a scheduler, would take a saved run for a failed one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

_is_held_up = False


def expect_to_be_held_up() -> None:
    """Ray will not let this process come to its end by itself."""
    global _is_held_up
    _is_held_up = True


def leave(ended: SystemExit) -> NoReturn:
    """End the process as it was about to, past Ray where need be."""
    if not _is_held_up:
        raise ended
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))

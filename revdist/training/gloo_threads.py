"""How Linux schedules gloo's threads where a replica has one core.

Gloo's thread that waits on sockets wakes when a peer sends, often while another thread of gloo's is about to
send on the same connection and holds its lock. On one core the woken thread takes the core at once, finds
the lock taken and asks the kernel again and again, until the scheduler's next tick lets the other go on: 3 to
4 ms, several times what a small reduction takes. As a batch thread it wakes without taking the core from
whoever runs.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TASKS = Path("/proc/self/task")
_WAITS_ON_SOCKETS = "gloo_tcp_loop"


def let_others_finish() -> None:
    """Make the threads of this process that wait on gloo's sockets batch threads; elsewhere than on Linux, nothing.

    It takes no privilege, and keeps their share of a core that others want too.
    """
    for task in _TASKS.iterdir() if _TASKS.exists() else ():
        with contextlib.suppress(OSError):  # the thread has ended
            if (task / "comm").read_text().strip() == _WAITS_ON_SOCKETS:
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))

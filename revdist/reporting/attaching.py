"""`revdist attach`: the live view of a run that another process drives, from its directory."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from revdist.cluster.claim import is_alive
from revdist.reporting.following import RunFollower
from revdist.reporting.live import LiveView
from revdist.reporting.rank_logs import LogFollower
from revdist.reporting.screens import HeldScreen, screen_for
from revdist.reporting.status import RunStatus, look_after, read_status
from revdist.training.run_directory import RunReader

TICK_S = 0.2
RECENT = 8
"""Lines about what happened before, shown when one attaches."""


def attach(console: Console, run_dir: Path, *, log_ranks: Collection[int] = ()) -> RunStatus:
    """Show a living run until it ends, or until Ctrl-C, which leaves it alone; returns its status then.

    Raises UsageError where no run has been started in the directory.
    """
    status = read_status(run_dir)
    if not status.alive:
        return status
    try:
        _watch(console, run_dir, status.record.name, log_ranks)
    except KeyboardInterrupt:
        console.print("\nno longer watching: the run goes on", style="yellow")
        console.print(look_after(run_dir))
    return read_status(run_dir)


def _watch(console: Console, run_dir: Path, name: str, log_ranks: Collection[int]) -> None:
    screen = HeldScreen(screen_for(console), num_lines=RECENT)
    view = LiveView(console, name=name, screen=screen, log_ranks=log_ranks, waiting=f"waiting for {name} to begin ...")
    follower = RunFollower(run_dir, view)
    logs = LogFollower(run_dir, from_now=True)
    begun = False
    with view:
        while True:
            alive = is_alive(run_dir)  # asked first: what was written before the end is told before the end
            if begun:
                follower.tell_new()
            elif follower.catch_up():
                begun = True
                screen.release()
            if log_ranks:
                for rank, text in logs.new():
                    view.on_log(rank, text)
            if not alive:
                break
            time.sleep(TICK_S)
        status = read_status(run_dir)
        if begun and status.state == "done":
            view.on_end(RunReader(run_dir).summary() or {})

"""`revdist stop` as a person sees it: what it waits for, and what came of it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from revdist.cluster.stopping import stop_run
from revdist.reporting.failure import lines_text
from revdist.reporting.following import check_run_dir


def stop_and_tell(console: Console, run_dir: Path, *, now: bool, timeout_s: float) -> None:
    """Raises what `stop_run` raises."""
    check_run_dir(run_dir)
    with console.status("killing the run ..." if now else "waiting for the run to save and leave ..."):
        stopped = stop_run(run_dir, now=now, timeout_s=timeout_s)
    record = stopped.record
    if not stopped.was_alive:
        console.print(Text.assemble((record.name, "bold"), f" was not running: {record.state}"))
    elif record.error:
        console.print(lines_text(record.error, in_order=record.state == "stopped"), soft_wrap=True)
    else:  # it came to its end while it was asked to leave
        console.print(Text.assemble((record.name, "bold"), f" is {record.state}"))
    killed = f", {stopped.num_killed} processes had to be killed" if stopped.num_killed else ""
    console.print(f"nothing of it is running{killed}", style="dim")

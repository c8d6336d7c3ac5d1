"""`revdist launch --detach` as a person sees it: a moment's wait, then the commands to look after the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from revdist.cluster.detached import DetachedRun
from revdist.cluster.trainer import Trainer
from revdist.reporting.failure import lines_text
from revdist.reporting.phrases import shown_path
from revdist.reporting.status import look_after


def launch_detached(console: Console, errors: Console, trainer: Trainer, arguments: Sequence[str]) -> int:
    """Start `revdist` with these arguments in the background and wait until the run is under way.

    Returns the exit code: 0 once it trains, else that of the run, whose error is shown.
    trainer: what the arguments say, checked here, where mistakes are best told.
    """
    trainer.check()
    run_dir = trainer.choose_run_dir()
    log_dir = trainer.choose_log_dir(run_dir)
    more = [f"--run-dir={run_dir}", f"--log-dir={log_dir}", *(["--resume"] if trainer.resume else [])]
    with console.status(Text(f"starting {trainer.config.name} in the background ...")):
        cores = trainer.num_cores if trainer.address is None else None
        run = DetachedRun([*arguments, *more], run_dir, log_dir, cores=cores)
        record = run.wait_until_under_way()
    if record.exit_code:
        errors.print(lines_text(record.error, in_order=record.state == "stopped"), soft_wrap=True)
        errors.print(f"  all it said is in {shown_path(run.log)}", style="dim", soft_wrap=True)
        return record.exit_code
    _tell(console, run_dir, record.name, record.process.pid)
    return 0


def _tell(console: Console, run_dir: Path, name: str, pid: int) -> None:
    line = Text.assemble((name, "bold"), " is under way in ", (shown_path(run_dir), "bold"))
    line.append(f" · process {pid}", style="dim")
    console.print(line, soft_wrap=True)
    console.print(look_after(run_dir))

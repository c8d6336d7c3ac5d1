"""`revdist logs`: what the processes of the ranks print."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import final

from rich.console import Console
from rich.text import Text

from revdist.cluster.claim import is_alive
from revdist.cluster.detached import LAUNCHER_LOG
from revdist.cluster.run_record import read_record
from revdist.errors import UsageError
from revdist.reporting.following import check_run_dir
from revdist.reporting.palette import rank_color
from revdist.reporting.status import read_status

TICK_S = 0.2


def log_folder(run_dir: Path) -> Path:
    """Where a run's logs are written. Raises UsageError where that cannot be seen from here."""
    check_run_dir(run_dir)
    record = read_record(run_dir)
    folder = run_dir / "logs" if record is None else Path(record.log_dir)
    if not folder.is_dir():
        folder = run_dir / "logs"  # a directory that was moved has its logs with it
    if not folder.is_dir():
        where = "elsewhere" if record is None else f"to {record.log_dir} on {record.host}"
        raise UsageError(f"no logs in {run_dir}; its ranks have printed nothing yet, or it went {where}")
    return folder


@final
class LogFollower:
    """The lines of every rank's log, each once."""

    def __init__(self, run_dir: Path, *, from_now: bool = False) -> None:
        """from_now: leave out what is there already."""
        self._run_dir = run_dir
        self._read_to: dict[Path, int] = {}
        if from_now:
            self._read_to = {path: path.stat().st_size for _, path in self._files()}

    def new(self) -> Iterator[tuple[int, str]]:
        """What ranks have printed since, in whole lines."""
        for rank, path in self._files():
            with path.open("rb") as file:
                file.seek(self._read_to.get(path, 0))
                block = file.read()
            block = block[: block.rfind(b"\n") + 1]
            self._read_to[path] = self._read_to.get(path, 0) + len(block)
            if block:
                yield rank, block.decode("utf-8", errors="replace")

    def _files(self) -> list[tuple[int, Path]]:
        try:
            folder = log_folder(self._run_dir)
        except UsageError:
            return []
        found = [(path.stem.removeprefix("rank-"), path) for path in folder.glob("rank-*.log")]
        return sorted((int(rank), path) for rank, path in found if rank.isdecimal())


def show_logs(
    console: Console, run_dir: Path, *, ranks: Collection[int], local_ranks: Collection[int], follow: bool
) -> None:
    """Print what ranks have printed, and with `follow` what they go on to print until the run ends.

    ranks, local_ranks: those wanted, counted over the run or on each host; both empty: all.
    Raises UsageError where there is nothing to show and nothing will come.
    """
    folder = None if follow and is_alive(run_dir) else log_folder(run_dir)
    wanted = set(ranks) | _of_local_ranks(run_dir, local_ranks)
    logs = LogFollower(run_dir)
    shown = False
    while True:
        alive = follow and is_alive(run_dir)
        for rank, text in logs.new():
            if rank in wanted or not (ranks or local_ranks):
                shown = True
                _print(console, rank, text, with_rank=len(wanted) != 1)
        if not alive:
            break
        time.sleep(TICK_S)
    if not shown and folder is not None:
        launcher = folder / LAUNCHER_LOG
        more = f"; what the driver said is in {launcher}" if launcher.exists() else ""
        console.print(f"these ranks have printed nothing{more}", style="dim", soft_wrap=True)


def _print(console: Console, rank: int, text: str, *, with_rank: bool) -> None:
    for line in text.splitlines():
        head = Text(f"rank {rank} | " if with_rank else "", style=rank_color(rank))
        console.print(Text.assemble(head, Text.from_ansi(line)), soft_wrap=True)


def _of_local_ranks(run_dir: Path, local_ranks: Collection[int]) -> set[int]:
    """The ranks that have one of these numbers on their host."""
    if not local_ranks:
        return set()
    states = read_status(run_dir).progress.ranks.values()
    return {state.rank for state in states if state.local_rank in local_ranks}

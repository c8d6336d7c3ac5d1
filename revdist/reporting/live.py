"""The live view of a run: progress, a table of its devices, and a line for all that happens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from revdist.cluster.observer import Observer
from revdist.devices.reading import Reading
from revdist.planning.costs import Plan
from revdist.reporting.live_state import RunState
from revdist.reporting.palette import rank_color
from revdist.reporting.phrases import plan_change, shown_path
from revdist.reporting.screens import Screen, screen_for
from revdist.reporting.summary import summary_panel

EVENT_STYLES: Mapping[str, str] = {
    "co-tenant": "magenta",
    "joined": "green",
    "checkpoint": "dim",
    "checkpoint-failed": "bold red",
    "resumed": "dim",
    "out-of-memory": "bold yellow",
    "non-finite": "bold yellow",
    "lost": "bold red",
    "regroup": "bold cyan",
    "restart": "bold red",
    "supervisor": "yellow",
    "preempted": "bold yellow",
}
"""The events worth a line, with their colour. A replan is told from its plan, a failure by the error that it ends
with, and the rest shows in the table."""


MAX_NAMES = 8
"""Devices named in the first line; more are counted."""


class LiveView(Observer):
    """Shows a run on a console while it goes on. Use it as a context manager, so that the terminal is given back."""

    def __init__(
        self,
        console: Console,
        *,
        name: str = "run",
        screen: Screen | None = None,
        log_ranks: Collection[int] = (),
        waiting: str = "starting Ray and a process per device ...",
    ) -> None:
        """log_ranks: ranks, counted on each host, whose output is shown as well. waiting: shown until the start."""
        self._console = console
        self._screen = screen or screen_for(console)
        self._state = RunState(name)
        self._log_ranks = log_ranks
        self._starting = console.status(Text(waiting))
        self._is_open = False

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._starting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def on_start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        self._starting.stop()
        self._state.start(run_dir, devices)
        names = [state.device for state in self._state.ranks.values()]
        place = ", ".join(names) if len(names) <= MAX_NAMES else f"{len(names)} devices"
        self._console.print(Text.assemble((self._state.name, "bold"), f" on {place}"), soft_wrap=True)
        if not self._is_open:
            self._screen.open(self._state)
        self._is_open = True

    def on_profile(self, rank: int, device: str, done: int, total: int) -> None:
        self._state.rank(rank, device).profiled = (done, total)
        self._screen.refresh(self._state, now=done == total)

    def on_plan(self, plan: Plan, free_bytes: int) -> None:
        before = self._state.adopt(plan, free_bytes)
        style = "" if before is None else "cyan"
        self._tell(plan.rank, plan_change(plan, before, free_bytes), style, device=plan.device)
        self._screen.refresh(self._state, now=True)

    def on_regroup(self, devices: Sequence[Reading]) -> None:
        self._state.regroup(devices)
        self._screen.refresh(self._state, now=True)

    def on_log(self, rank: int, text: str) -> None:
        state = self._state.ranks.get(rank)
        if state is None or state.local_rank not in self._log_ranks:
            return
        for line in text.splitlines():
            self._screen.line(Text(f"rank {rank:>5}  {state.device}", style=rank_color(rank)), Text.from_ansi(line))

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._state.advance(metrics)
        self._screen.refresh(self._state)

    def on_event(self, event: Mapping[str, Any]) -> None:
        kind = str(event.get("kind", ""))
        rank = event.get("rank")
        self._state.total_steps = event.get("num_steps") or self._state.total_steps
        if kind == "start" and self._state.run_dir is not None:
            self._tell(None, f"writing to {shown_path(self._state.run_dir)}", "")
        if kind == "lost":
            self._state.lose(rank, str(event.get("device") or ""))
        if kind in EVENT_STYLES:
            detail = self._shortened(str(event.get("detail") or ""))
            sentence = f"{kind}: {detail}" if detail else kind
            self._tell(rank, sentence, EVENT_STYLES[kind], device=str(event.get("device") or ""))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._screen.refresh(self._state, now=True)
        self._close()
        self._console.print(summary_panel(summary, self._state))

    def _tell(self, rank: int | None, sentence: str, style: str, *, device: str = "") -> None:
        head = Text(f"step {self._state.step:>5}", style="dim")
        name = self._state.name_of(rank, device)
        if name:
            head.append(f"  {name}", style="not dim bold")
        self._screen.line(head, Text(sentence, style=style))

    def _shortened(self, detail: str) -> str:
        """Paths in the run directory without it, which was named at the start."""
        return detail.replace(f"{self._state.run_dir}/", "") if self._state.run_dir else detail

    def _close(self) -> None:
        self._starting.stop()
        if self._is_open:
            self._screen.close()
            self._is_open = False

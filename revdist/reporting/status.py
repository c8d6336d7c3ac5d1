"""`revdist status`: what a run is up to, from its directory alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from revdist.cluster.claim import state_of
from revdist.cluster.detached import LAUNCHER_LOG
from revdist.cluster.observer import Observer
from revdist.cluster.run_record import RunRecord, State, read_record
from revdist.devices.reading import Reading
from revdist.errors import UsageError
from revdist.planning.costs import Plan
from revdist.reporting.failure import lines_text
from revdist.reporting.following import RunFollower, check_run_dir
from revdist.reporting.live_state import RankState, RunState
from revdist.reporting.live_table import picture
from revdist.reporting.phrases import seconds, shown_path
from revdist.reporting.summary import command

STATE_STYLES: Mapping[State, str] = {
    "starting": "bold yellow",
    "running": "bold green",
    "done": "bold green",
    "failed": "bold red",
    "stopped": "bold yellow",
    "lost": "bold red",
}
NUM_EVENTS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run as its directory has it now."""

    run_dir: Path
    record: RunRecord
    state: State
    progress: RunState
    events: Sequence[Mapping[str, Any]]
    """The newest ones."""

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "running")

    @property
    def exit_code(self) -> int:
        """For scripts: 0 while the run lives, then the one it ended with; 1 where it was killed."""
        if self.alive:
            return 0
        return 1 if self.record.exit_code is None else self.record.exit_code


def read_status(run_dir: Path) -> RunStatus:
    """Raises UsageError where no run has been started in the directory."""
    check_run_dir(run_dir)
    record = read_record(run_dir)
    if record is None:
        raise UsageError(f"{run_dir} does not say who runs it: it holds no run.json, which `revdist launch` writes")
    state = state_of(run_dir, record)
    collector = _Collector(record.name)
    RunFollower(run_dir, collector).catch_up()
    progress = collector.state
    if state not in ("starting", "running"):
        progress.step_s = progress.samples_per_s = None  # nothing is left to wait for
    return RunStatus(
        run_dir=run_dir, record=record, state=state, progress=progress, events=collector.events[-NUM_EVENTS:]
    )


def status_view(status: RunStatus) -> RenderableType:
    """Who runs it and how far it is, its devices, what happened last, and what to do next."""
    parts: list[RenderableType] = [_headline(status)]
    if status.progress.ranks:
        parts.append(picture(status.progress))
    if status.events:
        parts.append(Padding(_events(status), (0, 0, 1, 1)))
    if not status.alive and status.record.error:
        parts.append(Padding(lines_text(status.record.error, in_order=status.state == "stopped"), (0, 0, 1, 1)))
    parts.append(_hints(status))
    return Group(*parts)


def status_mapping(status: RunStatus) -> dict[str, Any]:
    """The same for a program, as `revdist status --json` prints it."""
    record, progress = status.record, status.progress
    return {
        "run_dir": str(status.run_dir),
        "name": record.name,
        "state": status.state,
        "host": record.host,
        "pid": record.process.pid,
        "detached": record.detached,
        "deputy": record.deputy,
        "began_s": record.began_s,
        "ended_s": record.ended_s,
        "exit_code": record.exit_code,
        "error": list(record.error),
        "ray_address": record.ray_address,
        "metrics_url": record.metrics_url,
        "log_dir": record.log_dir,
        "step": progress.step,
        "num_steps": progress.total_steps,
        "epoch": progress.epoch,
        "loss": progress.loss,
        "samples_per_s": progress.samples_per_s,
        "ranks": [_rank_mapping(rank) for rank in progress.ranks.values()],
        "events": list(status.events),
    }


def look_after(run_dir: Path) -> RenderableType:
    """The commands for a run that goes on."""
    names = {"watch it": "attach", "its state": "status", "what ranks print": "logs", "end it": "stop"}
    return _hint_table({what: _command(name, run_dir) for what, name in names.items()})


def _command(name: str, run_dir: Path) -> str:
    return f"{command()} {name} {shown_path(run_dir)}"


def _hint_table(hints: Mapping[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, hint in hints.items():
        table.add_row(what, Text(hint))
    return Padding(table, (0, 0, 0, 1))


def _headline(status: RunStatus) -> Text:
    record = status.record
    until_s = time.time() if status.alive or record.ended_s is None else record.ended_s
    state = (status.state, STATE_STYLES[status.state])
    text = Text.assemble((record.name, "bold"), " is " if status.alive else " ", state)
    text.append(f" · process {record.process.pid} on {record.host}", style="dim")
    if status.alive:
        text.append(f" · for {seconds(max(0.0, until_s - record.began_s))}", style="dim")
        if record.deputy:
            text.append(f" · deputy on {record.deputy}", style="dim")
    elif record.ended_s is not None:
        ended = time.strftime("%d %b %H:%M", time.localtime(record.ended_s))
        text.append(f" · {ended}, after {seconds(max(0.0, until_s - record.began_s))}", style="dim")
    return text


def _events(status: RunStatus) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for event in status.events:
        name = status.progress.name_of(event.get("rank"), str(event.get("device") or ""))
        table.add_row(f"step {event.get('step', 0):>5}", name, f"{event['kind']}: {event.get('detail', '')}")
    return table


def _hints(status: RunStatus) -> RenderableType:
    if status.alive:
        return look_after(status.run_dir)
    if status.state == "lost":
        killed = Text(" its driver was killed, and could not say why it ends here\n", style="yellow")
        end = {"end what is left": _command("stop", status.run_dir)}
        return Group(killed, _hint_table(end | _what_is_there(status)))
    return _hint_table(_what_is_there(status))


def _what_is_there(status: RunStatus) -> dict[str, str]:
    """Where to look at a run that is over: its report, once it has begun, or what its driver said before."""
    if (status.run_dir / "config.yaml").is_file():
        return {"look at it": _command("report", status.run_dir)}
    folders = (Path(status.record.log_dir), status.run_dir / "logs")  # the latter where the directory was moved
    logs = [folder / LAUNCHER_LOG for folder in folders if (folder / LAUNCHER_LOG).is_file()]
    return {"what it said": shown_path(logs[0])} if logs else {}


def _rank_mapping(rank: RankState) -> dict[str, Any]:
    plan = rank.plan
    return {
        "rank": rank.rank,
        "device": rank.device,
        "uuid": rank.uuid,
        "lost": rank.lost,
        "free_bytes": rank.free_bytes,
        "peak_bytes": rank.peak_bytes,
        "samples_per_s": rank.samples_per_s,
        "share": plan and plan.share,
        "micro_batch": plan and plan.micro_batch,
        "budget_bytes": plan and plan.budget_bytes,
        "generation": plan and plan.generation,
        "schedule": plan and plan.schedule.strip,
    }


@final
class _Collector(Observer):
    """The state that a run's lines add up to."""

    def __init__(self, name: str) -> None:
        self.state = RunState(name)
        self.events: list[Mapping[str, Any]] = []

    def on_start(self, run_dir: Path, devices: Sequence[Reading]) -> None:
        self.state.start(run_dir, devices)

    def on_regroup(self, devices: Sequence[Reading]) -> None:
        self.state.regroup(devices)

    def on_plan(self, plan: Plan, free_bytes: int) -> None:
        self.state.adopt(plan, free_bytes)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.state.advance(metrics)

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "lost":
            self.state.lose(event.get("rank"), str(event.get("device") or ""))
        self.state.total_steps = event.get("num_steps") or self.state.total_steps
        self.events.append(event)

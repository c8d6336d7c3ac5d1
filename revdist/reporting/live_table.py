"""The picture of a running run: a table of devices over a progress bar."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from revdist.errors import format_bytes
from revdist.planning.costs import Plan
from revdist.reporting.live_state import RankState, RunState
from revdist.reporting.phrases import byte_unit, letters_used, rate, seconds
from revdist.reporting.strips import Strip, legend

MAX_RANKS = 16
"""Devices listed; a longer table would push the progress bar off the screen."""


def picture(state: RunState) -> RenderableType:
    parts: list[RenderableType] = [_table(state)]
    hidden = len(state.ranks) - MAX_RANKS
    if hidden > 0:
        parts.append(Text(f"  and {hidden} more devices: revdist status --json has them all", style="dim"))
    strips = [rank.plan.schedule.strip for rank in state.ranks.values() if rank.plan]
    if strips:
        parts.append(Padding(legend(letters_used(strips)), (0, 0, 0, 1)))
    parts.append(_progress(state))
    return Padding(Group(*parts), (1, 0, 0, 0))


def _table(state: RunState) -> Table:
    table = Table(box=None, padding=(0, 1), expand=True, header_style="dim")
    table.add_column("device", no_wrap=True)
    table.add_column("free", justify="right", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    table.add_column("schedule", ratio=1, no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("samples/s", justify="right", no_wrap=True)
    table.add_column("peak/predicted", justify="right", no_wrap=True)
    table.add_column("gen", justify="right", no_wrap=True)
    for rank in list(state.ranks.values())[:MAX_RANKS]:
        table.add_row(*_row(rank))
    return table


def _row(rank: RankState) -> tuple[RenderableType, ...]:
    name = Text(rank.device, style="strike dim" if rank.lost else "bold", overflow="ellipsis")
    free = "" if rank.free_bytes is None else format_bytes(rank.free_bytes)
    if rank.plan is None:
        return name, free, "", _profiling(rank), "", "", "", ""
    plan = rank.plan
    speed = "" if rank.samples_per_s is None else rate(rank.samples_per_s)
    return (
        name,
        free,
        format_bytes(plan.budget_bytes),
        Strip(plan.schedule.strip),
        str(plan.share),
        speed,
        _peak(rank.peak_bytes, plan),
        str(plan.generation),
    )


def _peak(measured_bytes: int | None, plan: Plan) -> str:
    """Measured and predicted peak of the activations, which is what the budget is for: `27.9/28.4 MiB`."""
    predicted = plan.schedule.need_bytes
    if measured_bytes is None:
        return f"-/{format_bytes(predicted)}"
    fixed = plan.predicted_peak_bytes - predicted
    measured = max(0, measured_bytes - fixed)
    unit, scale = byte_unit((measured, predicted))
    return f"{measured / scale:.1f}/{predicted / scale:.1f} {unit}"


def _profiling(rank: RankState) -> RenderableType:
    if rank.profiled is None:
        return Text("starting", style="dim")
    done, total = rank.profiled
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total or 1, done, width=16), Text(f"{done}/{total}", style="dim"))
    return grid


def _progress(state: RunState) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    bar = ProgressBar(state.total_steps or 1, min(state.step, state.total_steps or 0))
    grid.add_row(bar, Text(progress_line(state)))
    return Padding(grid, (1, 1, 0, 1))


def progress_line(state: RunState) -> str:
    """`step 120/450 · epoch 3 · loss 0.412 · 1,234 samples/s · 41 s left`."""
    if not state.step:
        return "profiling the devices" if state.profiling else "starting"
    parts = [f"step {state.step}" + (f"/{state.total_steps}" if state.total_steps else ""), f"epoch {state.epoch}"]
    if state.loss is not None:
        parts.append(f"loss {state.loss:.3g}")
    if state.samples_per_s is not None:
        parts.append(f"{rate(state.samples_per_s)} samples/s")
    if state.remaining_s is not None:
        parts.append(f"{seconds(state.remaining_s)} left")
    return " · ".join(parts)

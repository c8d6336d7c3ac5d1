"""Tables of devices: who has how much memory, and who holds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from revdist.devices.reading import Reading
from revdist.errors import format_bytes

MAX_HOLDERS = 4
"""Processes named per device, one a line."""


def devices_table(readings: Sequence[Reading], *, with_bar: bool = True) -> RenderableType:
    """One line a device, its note below where it has one."""
    if not readings:
        return Text("no devices: a CPU device exists once a run or `revdist.devices.open_device` has made it")
    several_hosts = len({reading.host for reading in readings}) > 1
    with_uuid = any(reading.kind == "cuda" for reading in readings)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("device", style="bold", no_wrap=True)
    if several_hosts:
        table.add_column("host", no_wrap=True)
    table.add_column("free", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    if with_bar:
        table.add_column("used", width=14)
    table.add_column("held by")
    if with_uuid:
        table.add_column("UUID", style="dim", overflow="fold")
    for reading in readings:
        table.add_row(*_row(reading, with_host=several_hosts, with_bar=with_bar, with_uuid=with_uuid))
    notes = [Text(f"  {reading.name}: {reading.note}", style="yellow") for reading in readings if reading.note]
    return Group(table, *notes)


def _row(reading: Reading, *, with_host: bool, with_bar: bool, with_uuid: bool) -> list[RenderableType]:
    row: list[RenderableType] = [reading.name]
    if with_host:
        row.append(reading.host)
    if reading.usable:
        row += [format_bytes(reading.free_bytes), format_bytes(reading.total_bytes)]
    else:
        row += [Text("unusable", style="red"), ""]
    if with_bar:
        row.append(_used_bar(reading) if reading.usable else "")
    row.append(_holders(reading))
    if with_uuid:
        row.append(reading.uuid if reading.kind == "cuda" else "")  # a CPU device is chosen by its name
    return row


def _used_bar(reading: Reading) -> RenderableType:
    share = reading.used_bytes / reading.total_bytes
    color = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(100, share * 100, width=8, complete_style=color, finished_style=color), f"{share:4.0%}")
    return grid


def _holders(reading: Reading) -> str:
    named = reading.holders[:MAX_HOLDERS]
    parts = [f"{holder.name} ({holder.pid}) {_size(holder.used_bytes)}" for holder in named]
    hidden = len(reading.holders) - len(named)
    return "\n".join(parts + ([f"and {hidden} more"] if hidden else [])) or "-"


def _size(used_bytes: int | None) -> str:
    """The driver does not always say how much a process holds."""
    return "?" if used_bytes is None else format_bytes(used_bytes)


def watch_devices(
    console: Console, read: Callable[[], Sequence[Reading]], *, every_s: float = 1.0, rounds: int | None = None
) -> None:
    """Show the devices again and again until interrupted, or `rounds` times.

    A terminal is redrawn in place; a pipe or file gets one table after another.
    """
    if not console.is_terminal:
        for index in _counted(rounds):
            if index:
                time.sleep(every_s)
            console.print(devices_table(read(), with_bar=False))
        return
    with Live(console=console, auto_refresh=False) as live:
        for index in _counted(rounds):
            if index:
                time.sleep(every_s)
            footer = Text(f"every {every_s:g} s; Ctrl-C ends", style="dim")
            live.update(Group(devices_table(read()), footer), refresh=True)


def _counted(rounds: int | None) -> Sequence[int]:
    return range(2**62 if rounds is None else rounds)

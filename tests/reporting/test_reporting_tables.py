from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from revdist.devices.reading import Holder, Reading
from revdist.reporting.tables import devices_table, watch_devices

MIB = 2**20
READING = Reading(
    uuid="CPU-1234",
    name="cpu-0",
    kind="cpu",
    index=0,
    host="node-a",
    total_bytes=48 * MIB,
    free_bytes=12 * MIB,
    used_bytes=36 * MIB,
    time_s=0.0,
    holders=(Holder(pid=42, name="python", used_bytes=36 * MIB), Holder(pid=43, name="other", used_bytes=None)),
)


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_device_shows_its_memory_and_its_holders() -> None:
    text = shown(devices_table([READING]))
    for part in ("cpu-0", "12.0 MiB", "48.0 MiB", "75%", "python (42) 36.0 MiB", "other (43) ?"):
        assert part in text
    assert "node-a" not in text
    assert "CPU-1234" not in text


def test_gpus_show_the_uuid_by_which_they_are_chosen() -> None:
    text = shown(devices_table([READING, dataclasses.replace(READING, kind="cuda", uuid="GPU-5678")]))
    assert "GPU-5678" in text
    assert "CPU-1234" not in text


def test_hosts_are_named_where_there_are_several() -> None:
    text = shown(devices_table([READING, dataclasses.replace(READING, host="node-b", name="cpu-1")]))
    assert "node-a" in text
    assert "node-b" in text


def test_an_unusable_device_says_why() -> None:
    text = shown(devices_table([dataclasses.replace(READING, total_bytes=0, note="driver mismatch")]))
    assert "unusable" in text
    assert "cpu-0: driver mismatch" in text


def test_many_holders_are_counted() -> None:
    holders = tuple(Holder(pid=pid, name="p", used_bytes=MIB) for pid in range(6))
    assert "and 2 more" in shown(devices_table([dataclasses.replace(READING, holders=holders)]))


def test_no_device_is_said_in_words() -> None:
    assert "no devices" in shown(devices_table([]))


def test_watching_reads_anew_each_round() -> None:
    readings = iter([[READING], [dataclasses.replace(READING, free_bytes=MIB)]])
    console = Console(file=io.StringIO(), width=120)
    watch_devices(console, lambda: next(readings), every_s=0.0, rounds=2)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12.0 MiB" in text
    assert " 1.0 MiB" in text


def test_watching_in_a_terminal_redraws_in_place() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    watch_devices(console, lambda: [READING], every_s=0.0, rounds=2)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1A" in text
    assert "Ctrl-C ends" in text

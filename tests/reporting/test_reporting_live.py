"""The live view, fed as the controller feeds it, on a terminal and on a pipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_run import MIB, START, event, plan, write_run

from revdist.devices.reading import Reading
from revdist.reporting.history import read_history
from revdist.reporting.live import LiveView
from revdist.reporting.live_state import RunState
from revdist.reporting.screens import LINE_S, LiveScreen, PlainScreen
from revdist.training.run_directory import plan_of


def reading(rank: int, host: str = "node-a") -> Reading:
    total = (48, 160)[rank] * MIB
    return Reading(
        uuid=f"CPU-{rank:04d}",
        name=f"cpu-{rank}",
        kind="cpu",
        index=rank,
        host=host,
        total_bytes=total,
        free_bytes=total - MIB,
        used_bytes=MIB,
        time_s=START,
    )


def console(*, terminal: bool, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=30, color_system=None)


def text_of(view_console: Console) -> str:
    return view_console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def play(view: LiveView, run_dir: Path) -> None:
    """Tell a view a whole recorded run, in the order the controller does."""
    history = read_history(write_run(run_dir, steps=60))
    view.on_start(run_dir, [reading(0), reading(1)])
    for rank in (0, 1):
        for done in range(1, 6):
            view.on_profile(rank, f"CPU-{rank:04d}", done, 5)
    told: list[tuple[float, Any, Any]] = []
    told += [(line["time"], view.on_plan, (plan_of(line), 20 * MIB)) for line in history.plans]
    told += [(line["time"], view.on_step, (line,)) for line in history.metrics]
    told += [(line["time"], view.on_event, (line,)) for line in history.events]
    for _, call, arguments in sorted(told, key=lambda item: item[0]):
        call(*arguments)
    assert history.summary is not None
    view.on_end(history.summary)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_told_from_start_to_end(tmp_path: Path, terminal: bool) -> None:
    out = console(terminal=terminal, width=140)
    with LiveView(out, name="sample") as view:
        play(view, tmp_path / "run")
    text = text_of(out)
    assert "sample on cpu-0, cpu-1" in text
    assert "writing to " in text
    assert "less memory is free (20.0 MiB): share 44 -> 40 samples; 3 kept, 11 rebuilt (was 14 kept)" in text
    assert "cpu-1  co-tenant: takes 90.0 MiB" in text
    assert "98.33%" in text
    assert "1.31 times as fast as an equal split of the batch" in text
    assert text.rstrip().endswith("╯")


def test_a_terminal_shows_the_table_and_the_progress(tmp_path: Path) -> None:
    out = console(terminal=True)
    with LiveView(out) as view:
        play(view, tmp_path / "run")
    text = text_of(out)
    for part in ("device", "free", "budget", "schedule", "share", "samples/s", "peak/predicted", "gen"):
        assert part in text
    assert "IIIIIIIIIIIISS" in text
    assert "step 60/60 · epoch 2 · loss" in text
    assert "profiling" in text


def test_a_pipe_gets_a_line_now_and_then(tmp_path: Path) -> None:
    out, now = console(terminal=False), [0.0]
    screen = PlainScreen(out, clock=lambda: now[0])
    with LiveView(out, screen=screen) as view:
        view.on_start(tmp_path, [reading(0), reading(1)])
        view.on_event(event(0, "start", num_steps=60))
        for step, line in enumerate(read_history(write_run(tmp_path / "run", steps=12)).metrics):
            now[0] = step * LINE_S / 4
            view.on_step(line)
    lines = [line for line in text_of(out).splitlines() if line.startswith("step ") and "/60" in line]
    assert [line.split(" ·")[0] for line in lines] == ["step 1/60", "step 5/60", "step 9/60"]


def test_a_terminal_is_not_redrawn_for_every_step(tmp_path: Path) -> None:
    out = console(terminal=True)
    screen = LiveScreen(out, clock=lambda: 0.0)
    with LiveView(out, screen=screen) as view:
        view.on_start(tmp_path, [reading(0)])
        drawn = len(text_of(out))
        for step in range(1, 50):
            view.on_step({"step": step, "ranks": []})
        assert len(text_of(out)) == drawn


def test_a_lost_rank_is_marked_and_told(tmp_path: Path) -> None:
    out = console(terminal=True)
    with LiveView(out) as view:
        view.on_start(tmp_path, [reading(0), reading(1)])
        view.on_event(event(7, "lost", rank=1, detail="killed by signal 9"))
    assert "cpu-1  lost: killed by signal 9" in text_of(out)


def test_a_rank_has_the_speed_of_the_samples_it_took_where_an_epoch_ends_with_fewer() -> None:
    state = RunState("run")
    state.advance({"step": 9, "step_s": 0.5, "ranks": [{"rank": 0, "share": 64, "samples": 21}]})
    assert state.ranks[0].samples_per_s == 42


def test_hosts_are_named_where_there_are_several(tmp_path: Path) -> None:
    out = console(terminal=True)
    with LiveView(out) as view:
        view.on_start(tmp_path, [reading(0), reading(1, host="node-b")])
    assert "cpu-1@node-b" in text_of(out)


def test_the_table_fits_eighty_columns_with_a_long_chain(tmp_path: Path) -> None:
    out = console(terminal=True, width=80)
    line = plan(1, 0, START, 12, "start", 4096, 0) | {"strip": "I" * 500}
    line["schedule"] = {"modes": ["INVERT"] * 500, "extra_s": 0.1, "need_bytes": 900 * MIB}
    with LiveView(out) as view:
        view.on_start(tmp_path, [reading(0), reading(1)])
        view.on_event(event(0, "start", num_steps=100_000))
        view.on_plan(plan_of(line | {"predicted_peak_bytes": 1000 * MIB}), 20 * MIB)
        view.on_step({"step": 99_999, "epoch": 120, "loss": 0.1234, "step_s": 0.5, "samples_per_s": 123456.0})
    rows = [row for row in text_of(out).splitlines() if "IIIIIIII" in row]
    assert rows
    assert all(len(row) <= 80 for row in rows)
    assert any("900.0 MiB" in row and "4096" in row for row in rows)


def test_the_terminal_is_given_back_when_the_run_fails(tmp_path: Path) -> None:
    out = console(terminal=True)

    def fail() -> None:
        with LiveView(out) as view:
            view.on_start(tmp_path, [reading(0)])
            raise RuntimeError("worker died")

    with pytest.raises(RuntimeError, match="worker died"):
        fail()
    text = text_of(out)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_rows_of_lost_ranks_vanish_and_newcomers_appear(tmp_path: Path) -> None:
    out = console(terminal=True, width=120)
    history = read_history(write_run(tmp_path / "run", steps=60))
    with LiveView(out) as view:
        view.on_start(tmp_path, [reading(0), reading(1)])
        for line in history.plans[:2]:
            view.on_plan(plan_of(line), 20 * MIB)
        view.on_event(event(7, "lost", rank=0, device="CPU-0000", detail="killed by signal 9"))
        # Its plan under the new rank comes before the news of who has which.
        view.on_plan(plan_of(history.plans[1] | {"rank": 0, "share": 64, "reason": "lost"}), 20 * MIB)
        drawn = len(text_of(out))
        view.on_regroup([reading(1)])
        view.on_event(event(7, "regroup", detail="1 replica, shares 64, 0.11 s of pause"))
        view.on_step({"step": 8, "ranks": [{"rank": 0, "device": "CPU-0001", "share": 64}]})
    text = text_of(out)
    assert "cpu-1  a device was lost: share 44 -> 64 samples" in text
    assert "regroup: 1 replica, shares 64" in text
    assert "cpu-0" not in text[drawn:]
    assert "cpu-1" in text[drawn:]


def test_a_newcomer_is_shown_while_it_is_measured_and_not_when_it_failed(tmp_path: Path) -> None:
    out = console(terminal=True, width=120)
    with LiveView(out) as view:
        view.on_start(tmp_path, [reading(0), reading(1)])
        view.on_regroup([reading(0)])
        drawn = len(text_of(out))
        view.on_profile(-1, "CPU-0001", 5, 5)
        assert "cpu-1" in text_of(out)[drawn:]  # as it was called before
        assert "5/5" in text_of(out)[drawn:]
        view.on_event(event(9, "lost", detail="cpu-1 on 10.0.0.2 did not join: no memory"))
        drawn = len(text_of(out))
        view.on_regroup([reading(0)])
        assert "cpu-1" not in text_of(out)[drawn:]


def test_what_chosen_ranks_print_is_shown_above_the_table(tmp_path: Path) -> None:
    out = console(terminal=True, width=120)
    with LiveView(out, log_ranks={0}) as view:
        view.on_start(tmp_path, [reading(0), reading(1, host="node-b")])
        view.on_log(0, "hello\n[not markup] of user code\n")
        view.on_log(1, "counted on its own host\n")
        view.on_log(7, "nobody\n")
    text = text_of(out)
    assert "cpu-0@node-a  hello" in text
    assert "[not markup] of user code" in text
    assert "counted on its own host" in text
    assert "nobody" not in text

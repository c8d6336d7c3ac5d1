"""A run looked at from another terminal: status, the attached view, its ranks' logs, its end."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_run import DEVICES, MIB, START, event, plan, write_run
from typer.testing import CliRunner, Result

from revdist import cli
from revdist.cluster.claim import RunClaim
from revdist.cluster.observer import Observer
from revdist.cluster.run_record import read_record
from revdist.errors import RunFailed, UsageError
from revdist.reporting.attaching import attach
from revdist.reporting.following import GrowingLines, RunFollower
from revdist.reporting.rank_logs import show_logs
from revdist.reporting.status import read_status, status_mapping, status_view


def console(*, terminal: bool = False, width: int = 110) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=40, color_system=None)


def text_of(out: Console) -> str:
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="revdist")


def claim(run_dir: Path) -> RunClaim:
    return RunClaim(run_dir, name="sample", log_dir=run_dir / "logs")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=60, finished=False)


@pytest.fixture
def alive(run_dir: Path) -> Iterator[RunClaim]:
    with claim(run_dir) as held:
        held.update(state="running")
        yield held


def failed(run_dir: Path) -> None:
    with pytest.raises(RunFailed), claim(run_dir):
        raise RunFailed("rank 1 on node-a failed: disk full; free some space", rank=1, host="node-a")


def append(run_dir: Path, name: str, line: dict[str, Any]) -> None:
    with (run_dir / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_a_living_run_shows_its_devices_its_progress_and_what_to_do(run_dir: Path, alive: RunClaim) -> None:
    status = read_status(run_dir)
    out = console()
    out.print(status_view(status))
    text = text_of(out)
    assert f"sample is running · process {alive.record.process.pid} on {alive.record.host}" in text
    assert "cpu-0" in text
    assert "step 59/60 · epoch 2 · loss" in text
    assert "co-tenant: gives it back" in text
    for command in ("attach", "status", "logs", "stop"):
        assert f" {command} {run_dir}" in text
    assert status.exit_code == 0


def test_a_failed_run_says_why_and_exits_as_it_did(run_dir: Path) -> None:
    failed(run_dir)
    result = run("status", run_dir)
    assert result.exit_code == 1
    assert "sample failed" in result.stdout
    assert "rank 1 on node-a failed: disk full" in result.stdout
    assert "free some space" in result.stdout


def test_a_run_that_never_began_has_no_report_but_what_its_driver_said(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    failed(run_dir)
    assert " report " not in run("status", run_dir).stdout
    (run_dir / "logs" / "launcher.log").touch()
    found = run("status", run_dir).stdout
    assert "".join(found.split()).endswith(f"whatitsaid{run_dir}/logs/launcher.log")
    assert " report " not in found
    (run_dir / "config.yaml").touch()
    assert " report " in run("status", run_dir).stdout


def test_a_killed_run_is_lost(run_dir: Path) -> None:
    held = claim(run_dir)
    held.__enter__()
    held.update(state="running")
    assert held._lock is not None
    os.close(held._lock)  # as the kernel does when the process is killed
    held._lock = None
    status = read_status(run_dir)
    assert (status.state, status.exit_code) == ("lost", 1)
    out = console()
    out.print(status_view(status))
    assert "its driver was killed" in text_of(out)
    assert "end what is left" in text_of(out)


@pytest.mark.parametrize(
    "words",
    [
        "[/pytorch/third_party/gloo/pair.cc:538] Connection closed by peer",
        "[enforce fail at container.cc:603] file [a.bin] :smile:",
    ],
)
@pytest.mark.parametrize("command", ["status", "attach"])
def test_brackets_in_an_event_are_shown_as_they_are(run_dir: Path, command: str, words: str) -> None:
    append(run_dir, "events", event(60, "failed", detail=words))
    failed(run_dir)
    result = CliRunner().invoke(cli.app, [command, str(run_dir)], env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert f"failed: {words}" in result.stdout


def test_damaged_lines_are_passed_over(run_dir: Path, alive: RunClaim) -> None:
    before = read_status(run_dir)
    for name in ("plans", "metrics", "events"):
        with (run_dir / f"{name}.jsonl").open("ab") as file:
            file.write(b'\n{"time": 1.0, "st\n\xff\n3\n{"step": 61, "kind": "end"}\n')
    after = read_status(run_dir)
    assert (after.progress.step, after.events) == (before.progress.step, before.events)


def test_json_has_all_of_it(run_dir: Path, alive: RunClaim) -> None:
    found = json.loads(run("status", run_dir, "--json").stdout)
    assert found == json.loads(json.dumps(status_mapping(read_status(run_dir))))
    assert (found["state"], found["step"], found["num_steps"]) == ("running", 59, 60)
    assert [rank["device"] for rank in found["ranks"]] == ["cpu-0", "cpu-1"]
    assert set(found["ranks"][1]["schedule"]) == {"S"}
    assert found["events"][-1]["kind"] == "co-tenant"


def test_devices_that_the_table_leaves_out_are_in_the_json(run_dir: Path, alive: RunClaim) -> None:
    devices = [{**DEVICES[0], "rank": rank, "device": f"CPU-{rank:04d}", "name": f"cpu-{rank}"} for rank in range(40)]
    append(run_dir, "events", event(60, "regroup", detail="40 replicas", devices=devices))
    status = read_status(run_dir)
    out = console()
    out.print(status_view(status))
    assert "and 24 more devices: revdist status --json has them all" in text_of(out)
    assert [rank["device"] for rank in status_mapping(status)["ranks"]] == [device["name"] for device in devices]


@pytest.mark.parametrize("command", ["status", "attach", "logs", "stop"])
def test_what_is_no_run_directory_is_said_to_be_none(tmp_path: Path, command: str) -> None:
    result = run(command, tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "no run directory" in result.stderr


def test_a_regroup_changes_the_rows(run_dir: Path, alive: RunClaim) -> None:
    newcomer = {"rank": 1, "device": "CPU-0009", "name": "cpu-9", "host": "node-b", "total_bytes": 90 * MIB}
    append(run_dir, "events", event(59, "lost", rank=0, device="CPU-0000", detail="killed"))
    devices = [{**DEVICES[1], "rank": 0}, newcomer]
    append(run_dir, "events", event(59, "regroup", detail="2 replicas, shares 40 + 24", devices=devices))
    append(run_dir, "plans", plan(1, 59, START + 5.9, 4, "joined", 24, 4) | {"device": "CPU-0009", "free_bytes": MIB})
    progress = read_status(run_dir).progress
    assert [state.device for state in progress.ranks.values()] == ["cpu-1@node-a", "cpu-9@node-b"]
    assert progress.ranks[0].plan is not None
    assert progress.ranks[1].plan is not None
    assert progress.ranks[1].plan.share == 24


def test_lines_come_whole_and_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = GrowingLines(path)
    assert lines.new() == []
    path.write_text('{"time": 1.0, "step": 1}\n{"time": 2.0, "st')
    assert lines.new() == [{"time": 1.0, "step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n[cut off{"time": 3.0, "step": 3}\n{"step": 4}\n{"time": 5.0, "step": 5}\n')
    assert lines.new() == [{"time": 2.0, "step": 2}, {"time": 5.0, "step": 5}]
    assert GrowingLines(path, newest_bytes=35).new() == [{"time": 5.0, "step": 5}]


def test_a_file_written_anew_without_lost_steps_is_told_from_there_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def write(where: Path, *steps: tuple[int, float]) -> None:
        where.write_text("".join(json.dumps({"step": step, "time": time}) + "\n" for step, time in steps))

    write(path, (1, 10.0), (2, 11.0), (3, 12.0))
    lines = GrowingLines(path)
    assert [line["step"] for line in lines.new()] == [1, 2, 3]
    write(tmp_path / "part", (1, 10.0), (2, 20.0))
    (tmp_path / "part").replace(path)
    assert [line["step"] for line in lines.new()] == [2]
    assert lines.new() == []


@pytest.mark.parametrize("newest_bytes", [None, 120])
def test_a_file_whose_lost_steps_were_cut_off_is_told_from_there_on(tmp_path: Path, newest_bytes: int | None) -> None:
    path = tmp_path / "metrics.jsonl"

    def written(*steps: tuple[int, float]) -> str:
        return "".join(json.dumps({"step": step, "time": time}) + "\n" for step, time in steps)

    path.write_text(written(*((step, float(step)) for step in range(1, 10))))
    lines = GrowingLines(path, newest_bytes=newest_bytes)
    assert [line["step"] for line in lines.new()][-1] == 9
    os.truncate(path, len(written(*((step, float(step)) for step in range(1, 8)))))
    assert lines.new() == []
    with path.open("a") as file:
        file.write(written((8, 20.0)))
    assert [line["step"] for line in lines.new()] == [8]
    os.truncate(path, len(written(*((step, float(step)) for step in range(1, 7)))))
    with path.open("a") as file:  # before anybody has looked
        file.write(written((7, 30.0), (8, 31.0), (9, 32.0)))
    assert [line["step"] for line in lines.new()] == [7, 8, 9]
    assert lines.new() == []


def test_a_follower_tells_of_the_newest_session_only(run_dir: Path) -> None:
    class Steps(Observer):
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.starts = 0

        def on_start(self, run_dir: Path, devices: Any) -> None:
            self.starts += 1

        def on_step(self, metrics: Any) -> None:
            self.steps.append(metrics["step"])

    later = START + 1000
    (run_dir / "metrics.jsonl").write_text("")
    append(run_dir, "metrics", {"time": START + 5, "step": 50})
    append(run_dir, "events", event(50, "start", num_steps=60, devices=DEVICES) | {"time": later})
    append(run_dir, "metrics", {"time": later + 1, "step": 51})
    steps = Steps()
    follower = RunFollower(run_dir, steps)
    assert follower.catch_up()
    assert (steps.steps, steps.starts) == ([51], 1)
    assert not follower.tell_new()
    append(run_dir, "metrics", {"time": later + 2, "step": 52})
    assert follower.tell_new()
    assert steps.steps == [51, 52]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_attached_view_shows_the_past_in_short_and_then_what_comes(run_dir: Path, terminal: bool) -> None:
    out = console(terminal=terminal, width=140)
    held = claim(run_dir)
    held.__enter__()
    held.update(state="running")

    def go_on() -> None:
        append(run_dir, "events", event(60, "out-of-memory", rank=0, device="CPU-0000", detail="met in time"))
        write_run(run_dir.parent / "finished", steps=60)
        (run_dir.parent / "finished" / "summary.json").rename(run_dir / "summary.json")
        held.__exit__(None, None, None)

    ends = threading.Timer(0.6, go_on)
    ends.start()
    status = attach(out, run_dir)
    ends.join()
    text = text_of(out)
    assert "sample on cpu-0, cpu-1" in text
    assert "cpu-1  co-tenant: takes 90.0 MiB" in text
    assert "out-of-memory: met in time" in text
    assert "98.33%" in text
    assert status.state == "done"


def test_ctrl_c_leaves_the_run_alone(run_dir: Path, alive: RunClaim, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("revdist.reporting.attaching.time.sleep", press)
    out = console()
    assert attach(out, run_dir).alive
    assert "no longer watching: the run goes on" in text_of(out)
    assert f"stop {run_dir}" in text_of(out)


def test_attaching_to_a_run_that_is_over_shows_how_it_ended(run_dir: Path) -> None:
    failed(run_dir)
    result = run("attach", run_dir)
    assert result.exit_code == 1
    assert "sample failed" in result.stdout


def write_logs(run_dir: Path) -> None:
    (run_dir / "logs").mkdir()
    for rank in (0, 1):
        (run_dir / "logs" / f"rank-{rank}.log").write_text(f"hello from {rank}\n\x1b[31mred\x1b[0m [not markup]\n")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            [],
            [
                "rank 0 | hello from 0",
                "rank 0 | red [not markup]",
                "rank 1 | hello from 1",
                "rank 1 | red [not markup]",
            ],
        ),
        (["--rank", "1"], ["hello from 1", "red [not markup]"]),
        (["--local-ranks-filter", "0"], ["hello from 0", "red [not markup]"]),
        (["--rank", "7"], ["these ranks have printed nothing"]),
    ],
)
def test_logs_are_shown_by_rank(run_dir: Path, arguments: list[str], lines: list[str]) -> None:
    with claim(run_dir):
        pass
    write_logs(run_dir)
    result = run("logs", run_dir, *arguments)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == lines


def test_logs_are_followed_until_the_run_ends(run_dir: Path) -> None:
    held = claim(run_dir)
    held.__enter__()
    write_logs(run_dir)
    out = console()

    def go_on() -> None:
        with (run_dir / "logs" / "rank-1.log").open("a") as file:
            file.write("last words\n")
        held.__exit__(None, None, None)

    ends = threading.Timer(0.5, go_on)
    ends.start()
    show_logs(out, run_dir, ranks=[1], local_ranks=[], follow=True)
    ends.join()
    assert text_of(out).splitlines() == ["hello from 1", "red [not markup]", "last words"]


def test_without_logs_it_says_where_they_may_be(run_dir: Path) -> None:
    with pytest.raises(UsageError, match="its ranks have printed nothing yet"):
        show_logs(console(), run_dir, ranks=[], local_ranks=[], follow=False)


def test_stopping_what_does_not_run_says_how_it_ended(run_dir: Path) -> None:
    failed(run_dir)
    result = run("stop", run_dir)
    assert result.exit_code == 0
    assert "sample was not running: failed" in result.stdout
    assert "nothing of it is running" in result.stdout
    record = read_record(run_dir)
    assert record is not None
    assert record.state == "failed"

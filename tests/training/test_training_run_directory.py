"""What a run writes is read again, finished or not."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from replicas import run_config

from revdist.errors import ConfigError
from revdist.planning.costs import Mode, Plan, Schedule
from revdist.training.run_directory import RunReader, RunWriter, default_run_dir, plan_of

PLAN = Plan(
    generation=1,
    rank=0,
    device="CPU-1",
    share=3,
    micro_batch=2,
    accumulation_steps=2,
    schedule=Schedule(modes=(Mode.SAVE, Mode.INVERT), extra_s=0.5, need_bytes=7),
    budget_bytes=9,
    predicted_step_s=1.5,
    predicted_peak_bytes=20,
    reason="memory-lost",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.create(run_config())
    writer.plan(PLAN, time=1.0, step=4, free_bytes=5)
    writer.metrics({"time": 0.0, "step": 1, "loss": float("nan"), "ranks": [{"rank": 0}]})
    writer.event({"time": 0.0, "kind": "start", "step": 0})
    reader = RunReader(tmp_path / "run")
    assert reader.config() == run_config()
    (plan,) = reader.plans()
    assert plan["strip"] == "SI"
    assert plan_of(plan) == PLAN
    assert list(reader.metrics()) == [{"time": 0.0, "step": 1, "loss": None, "ranks": [{"rank": 0}]}]
    assert list(reader.events()) == [{"time": 0.0, "kind": "start", "step": 0}]
    assert reader.summary() is None
    writer.summary({"steps": 3})
    assert reader.summary() == {"steps": 3}
    writer.close()


def test_a_half_written_line_is_not_read(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.create(run_config())
    writer.close()
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "step": 1}\n{"time": 2.0, "step":')
    assert list(RunReader(tmp_path).metrics()) == [{"time": 1.0, "step": 1}]


DAMAGED = (b'{"time": 2.0, "st', b'{"time": 1.0, \xff}', b"\0" * 9, b"3", b'{"step": 2, "kind": "end"}', b"")


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_not_read(tmp_path: Path, damaged: bytes) -> None:
    writer = RunWriter(tmp_path)
    writer.create(run_config())
    writer.plan(PLAN, time=1.0, step=4, free_bytes=5)
    writer.metrics({"time": 1.0, "step": 1})
    writer.event({"time": 1.0, "kind": "start", "step": 0})
    writer.close()
    for name in ("plans", "metrics", "events"):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(damaged + b"\n" + path.read_bytes() + damaged + b"\n")
    reader = RunReader(tmp_path)
    assert [plan_of(plan) for plan in reader.plans()] == [PLAN]
    assert list(reader.metrics()) == [{"time": 1.0, "step": 1}] == [reader.last_step()]
    assert list(reader.events()) == [{"time": 1.0, "kind": "start", "step": 0}]


@pytest.mark.parametrize("damaged", [b"", b'{"steps": 3, "wa', b"\xff", b"[3]"])
def test_a_damaged_summary_is_none(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "summary.json").write_bytes(damaged)
    assert RunReader(tmp_path).summary() is None


@pytest.mark.parametrize("bytes_a_line", [10, 100_000])
def test_the_last_step_is_found_from_the_end_of_the_file(tmp_path: Path, bytes_a_line: int) -> None:
    (tmp_path / "config.yaml").touch()
    reader = RunReader(tmp_path)
    assert reader.last_step() is None
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step')
    assert reader.last_step() is None
    lines = [json.dumps({"time": 1.0, "step": step, "more": "x" * bytes_a_line}) + "\n" for step in range(1, 6)]
    for number in range(1, len(lines) + 1):
        metrics.write_text("".join(lines[:number]) + lines[0][:20])
        assert (reader.last_step() or {})["step"] == number


def test_nothing_exists_before_the_run_begins(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").close()
    assert not (tmp_path / "run").exists()


def test_the_directory_is_not_open_to_everybody(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run").create(run_config())
    assert (tmp_path / "run").stat().st_mode & 0o027 == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the run directory"):
        RunWriter(tmp_path / "file" / "run").create(run_config())


def test_another_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        RunReader(tmp_path)


def test_runs_of_one_second_get_numbers(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    first = default_run_dir("digits", now, tmp_path)
    first.mkdir()
    assert first.name == "digits-20260102-030405"
    assert default_run_dir("digits", now, tmp_path).name == "digits-20260102-030405-2"


def test_lines_of_steps_that_were_lost_are_removed_on_resume(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    writer.create(run_config(), step=0)
    for step in (1, 2, 3):
        writer.metrics({"time": 1.0, "step": step})
    writer.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "step": 4')
    again = RunWriter(tmp_path / "run")
    assert again.create(run_config(), step=2) == 2
    again.metrics({"time": 2.0, "step": 3})
    again.close()
    assert [(line["step"], line["time"]) for line in RunReader(tmp_path / "run").metrics()] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]
    onlooker = RunWriter(tmp_path / "run")
    assert onlooker.create(run_config()) == 0
    onlooker.close()


@pytest.mark.parametrize("bytes_a_line", [10, 100_000])
@pytest.mark.parametrize("half", ["", '{"step": 6, "mo', "\0\0\0\n", "3\n"])
def test_lost_steps_are_looked_for_at_the_end_of_the_file_alone(tmp_path: Path, bytes_a_line: int, half: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    begin = "what is not read need not make sense\n" * 3
    lines = [json.dumps({"step": step, "more": "x" * bytes_a_line}) + "\n" for step in range(1, 6)]
    for kept in (5, 3, 1):
        metrics.write_text(begin + "".join(lines) + half)
        writer = RunWriter(tmp_path)
        assert writer.create(run_config(), step=kept) == 5 - kept + bool(half)
        writer.close()
        assert metrics.read_text() == begin + "".join(lines[:kept])
    metrics.write_text("".join(lines) + half)
    assert RunWriter(tmp_path).create(run_config(), step=0) == 5 + bool(half)
    assert metrics.read_bytes() == b""

"""Runs in the background, real ones: started, looked after from other terminals, stopped without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import settings

import revdist
from revdist.cluster import watchman
from revdist.cluster.detached import DetachedRun
from revdist.cluster.processes import started_with, writing_below
from revdist.cluster.run_record import RUN_ID, RunRecord, read_record
from revdist.cluster.stopping import stop_run
from revdist.devices import list_devices
from revdist.training.checkpoint_files import checkpoints
from revdist.training.run_directory import RunReader

ROOT = Path(revdist.__file__).parent.parent
PATHS = [str(ROOT / "tests" / "training"), str(ROOT)]

DRIVER = """#!{python}
import sys, time
from pathlib import Path
from revdist.cluster.claim import RunClaim
run_dir = Path({run_dir!r})
with RunClaim(run_dir, name="fake", log_dir=run_dir / "logs") as claim:
    (run_dir / "config.yaml").touch()
    time.sleep(0.3)
    claim.update(state="running")
    time.sleep(300)
"""
"""Holds the claim of a run, as a driver does, and trains nothing."""


def instead_of_python(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script be what is run as Python, whatever its arguments."""
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
    monkeypatch.setattr(sys, "executable", str(path))


def revdist_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "revdist.cli", *(str(argument) for argument in arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "COLUMNS": "120", **more}


def run(*arguments: str | Path, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        revdist_command(*arguments), env=environment(), capture_output=True, text=True, timeout=timeout_s
    )


def status_of(run_dir: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(run("status", run_dir, "--json").stdout)
    return found


def family(record: RunRecord) -> list[int]:
    """Processes of this host that belong to a run, its driver first."""
    below = {process.pid for process in [*started_with(RUN_ID, record.run_id), *writing_below(record.ray_session)]}
    return [pid for pid in [record.process.pid, *sorted(below)] if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def holders() -> list[str]:
    return [holder.name for reading in list_devices() for holder in reading.holders]


@pytest.fixture
def config(tmp_path: Path, devices_folder: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(settings(epochs=4000, model={"factory": "talkative_models:classifier"})))
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Where the test's run goes; nothing of it outlives the test."""
    folder = tmp_path / "run"
    yield folder
    if (folder / "run.json").exists():
        run("stop", folder, "--now")


def test_a_mistake_is_told_at_once_in_five_lines_and_in_the_log(config: Path, run_dir: Path) -> None:
    for wrong, says in (("global_bach=3", "did you mean"), ("global_batch=1", "2 replicas")):
        done = run("launch", config, wrong, "--detach", "--run-dir", run_dir)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) <= 5
        assert not run_dir.exists()


@pytest.mark.timeout(60)
def test_a_run_whose_driver_was_killed_is_under_way_once_the_next_driver_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    instead_of_python(tmp_path / "driver", DRIVER.format(python=sys.executable, run_dir=str(folder)), monkeypatch)
    first = DetachedRun([], folder, folder / "logs", cores=None)
    killed = first.wait_until_under_way()
    assert killed.process.send(signal.SIGKILL)
    first._process.wait(timeout=10)
    second = DetachedRun(["--resume"], folder, folder / "logs", cores=None)
    try:
        record = second.wait_until_under_way()
        assert (record.process.pid, record.state) == (second._process.pid, "running")
        assert record.run_id == killed.run_id, "its replicas are found by it"
        assert stop_run(folder, now=True, timeout_s=10).num_killed == 1
    finally:
        second._process.kill()
        assert second._process.wait(timeout=10) == -signal.SIGKILL


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of the signals that a watchman passes on, as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("end", "starts", "code"),
    [
        ("kill -KILL $$", 6, 128 + signal.SIGKILL),
        ("exit 3", 1, 3),
        ("kill -TERM $$", 1, 128 + signal.SIGTERM),  # the second one that it got: the first lets it save
        ("(sleep 0.1; kill -TERM $PPID) & kill -KILL $$", 1, 128 + signal.SIGKILL),
    ],
)
def test_a_driver_is_started_anew_where_it_was_killed_and_nobody_wants_the_run_to_end(
    end: str, starts: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    instead_of_python(tmp_path / "driver", f"#!/bin/sh\necho >> {tmp_path}/starts\n{end}\n", monkeypatch)
    monkeypatch.setattr(watchman, "_PAUSE_S", 0.5 if "PPID" in end else 0.01)
    assert watchman.main(["-", str(tmp_path), "launch"]) == code
    assert len((tmp_path / "starts").read_text().splitlines()) == starts


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_cannot_start_ends_the_command_as_it_ends_itself(config: Path, run_dir: Path) -> None:
    done = run("launch", config, "model.kwargs={depht: 3}", "--detach", "--run-dir", run_dir)
    assert done.returncode == 2
    assert done.stderr.startswith("error: talkative_models:classifier(depht=3) raised TypeError")
    assert "launcher.log" in done.stderr.splitlines()[-1]
    status = run("status", run_dir)
    assert status.returncode == 2
    assert "small failed" in status.stdout
    assert "check its kwargs in the configuration" in (run_dir / "logs" / "launcher.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_in_the_background_is_looked_after_and_stopped_from_elsewhere(config: Path, run_dir: Path) -> None:
    started = run("launch", config, "--detach", "--run-dir", run_dir)
    assert started.returncode == 0, started.stderr
    for command in ("attach", "status", "logs", "stop"):
        assert f" {command} {run_dir}" in started.stdout
    assert len(list(RunReader(run_dir).metrics())) >= 1

    status = status_of(run_dir)
    assert (status["state"], status["detached"], status["num_steps"]) == ("running", True, 20_000)
    assert [rank["device"] for rank in status["ranks"]] == ["cpu-0", "cpu-1"]
    record = read_record(run_dir)
    assert record is not None
    assert os.getsid(record.process.pid) != os.getsid(0)  # no end of this terminal reaches it

    again = run("launch", config, "--run-dir", run_dir, "--resume")
    assert again.returncode == 2
    assert f"process {record.process.pid} on {record.host} is running a run" in again.stderr

    assert "built by rank 1 of 2" in run("logs", run_dir, "--rank", "1").stdout
    assert_ctrl_c_detaches(run_dir)
    assert status_of(run_dir)["state"] == "running"

    everybody = family(record)
    assert len(everybody) >= 5
    stopped = run("stop", run_dir)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by SIGTERM at step" in stopped.stdout
    assert "nothing of it is running\n" in stopped.stdout
    assert not [pid for pid in everybody if is_running(pid)]
    assert not [name for name in holders() if "small" in name]
    assert run("status", run_dir).returncode == 143
    last = list(RunReader(run_dir).metrics())[-1]["step"]
    assert checkpoints(run_dir / "checkpoints")[-1].name.endswith(f"{last:09d}")


def assert_ctrl_c_detaches(run_dir: Path) -> None:
    """Watch until a line of progress, then press Ctrl-C."""
    watching = subprocess.Popen(
        revdist_command("attach", run_dir), env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert watching.stdout is not None
        for line in watching.stdout:
            if "samples/s" in line:
                break
        watching.send_signal(signal.SIGINT)
        rest = watching.stdout.read()
        assert watching.wait(timeout=60) == 0
        assert "the run goes on" in rest
    finally:
        watching.kill()
        watching.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_whose_processes_are_killed_is_lost_its_rest_ended_and_it_resumes(config: Path, run_dir: Path) -> None:
    arguments = ["launch", config, "checkpoint.every_steps=5", "--detach", "--run-dir", run_dir]
    assert run(*arguments).returncode == 0
    record = read_record(run_dir)
    assert record is not None
    until_s = time.monotonic() + 60
    while not checkpoints(run_dir / "checkpoints") and time.monotonic() < until_s:
        time.sleep(0.2)
    everybody = family(record)
    watchman = psutil.Process(record.process.pid).ppid()
    for pid in (watchman, record.process.pid):  # else it is started anew
        os.kill(pid, signal.SIGKILL)
        while is_running(pid):
            time.sleep(0.05)
    lost = run("status", run_dir)
    assert lost.returncode == 1
    assert "small lost" in lost.stdout
    assert run("stop", run_dir).returncode == 0
    assert not [pid for pid in everybody if is_running(pid)]
    resumed = run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert status_of(run_dir)["step"] > 5
    newest = read_record(run_dir)
    assert newest is not None
    everybody = family(newest)
    killed = run("stop", run_dir, "--now")
    assert killed.returncode == 0
    assert "without saving" in killed.stdout
    assert not [pid for pid in everybody if is_running(pid)]
    assert not family(newest)

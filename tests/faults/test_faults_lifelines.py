"""The Ray head, or this host's raylet, is lost for good: the run saves before Ray ends it, and goes on elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harm import SLOW, holder, is_dead, launch, wait_for_steps, wait_until
from runs import settings

import revdist
from revdist.cluster.lifelines import Lifelines
from revdist.cluster.run_record import read_record
from revdist.errors import ConfigError
from revdist.training.checkpoint_files import newest_whole
from revdist.training.network import listen
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")


WATCHER = """
import sys, time
from revdist.cluster.lifelines import Lifelines
with Lifelines(sys.argv[1], raylet=sys.argv[2]) as watch:
    reason = watch.or_cut(lambda: None)
    time.sleep(1)
    while True:
        print(reason(), flush=True)
        time.sleep(0.05)
"""
"""Says again and again what is lost."""


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with listen("127.0.0.1") as listener:
        yield listener


@pytest.fixture
def raylet() -> Iterator[socket.socket]:
    with listen("127.0.0.1") as listener:
        yield listener


def test_a_head_that_does_not_answer_for_long_is_gone(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "4")
    host, port = head.getsockname()
    with Lifelines(f"{host}:{port}") as watch:
        reason = watch.or_cut(lambda: None)
        time.sleep(2.5)
        assert reason() is None
        head.close()
        wait_until(lambda: reason() is not None, "the head is not missed")
        assert f"{host}:{port}" in str(reason())
        assert watch.or_cut(lambda: "SIGTERM")() == "SIGTERM"


def test_one_that_was_stopped_itself_misses_nobody_for_that(head: socket.socket, raylet: socket.socket) -> None:
    """Before it has looked again, what it saw last is old; and what it misses then, it begins to miss."""
    command = [
        sys.executable,
        "-c",
        WATCHER,
        "{}:{}".format(*head.getsockname()),
        "{}:{}".format(*raylet.getsockname()),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(revdist.__file__).parent.parent)}
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "None\n"
        watcher.send_signal(signal.SIGSTOP)
        time.sleep(5)
        watcher.send_signal(signal.SIGCONT)
        told = [watcher.stdout.readline() for _ in range(60)]
        assert told == ["None\n"] * 60
    finally:
        watcher.kill()
        watcher.wait(timeout=10)


def test_patience_is_configured_and_ends_before_rays(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "4")
    host, port = head.getsockname()
    with pytest.raises(ConfigError, match=r"faults.head_s is 4, and Ray ends all processes 4 s after"):
        Lifelines(f"{host}:{port}", head_s=4)
    with Lifelines(f"{host}:{port}", head_s=1.5) as watch:
        head.close()
        wait_until(lambda: watch.head_is_gone, "the head is not missed")


def test_a_raylet_that_takes_no_connection_is_missed_sooner_than_a_head(
    head: socket.socket, raylet: socket.socket
) -> None:
    host, port = head.getsockname()
    with Lifelines(f"{host}:{port}", raylet="{}:{}".format(*raylet.getsockname())) as watch:
        reason = watch.or_cut(lambda: None)
        time.sleep(4.5)
        assert reason() is None, "it is there, and for longer than it would be missed"
        raylet.close()
        wait_until(lambda: reason() is not None, "the raylet is not missed")
        assert "raylet" in str(reason())
        assert not watch.head_is_gone


@contextlib.contextmanager
def launched(config: Path, run_dir: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run that is under way; all of its processes end with the test."""
    process = launch(config, run_dir, *more)
    family: list[psutil.Process] = []
    try:
        wait_for_steps(run_dir, 5, process)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait(timeout=20)


def kill(name: str, process: subprocess.Popen[bytes]) -> None:
    (found,) = [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == name]
    found.kill()


def assert_saved(process: subprocess.Popen[bytes], run_dir: Path, *, lost: str) -> int:
    """It left in order, saying what is lost; returns the steps that were taken."""
    output = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 143, output
    assert f"the loss of {lost}" in output
    taken = [step["step"] for step in RunReader(run_dir).metrics()]
    assert taken == list(range(1, len(taken) + 1))
    assert newest_whole(run_dir / "checkpoints").checkpoint.step == len(taken)
    record = read_record(run_dir)
    assert record is not None
    assert (record.state, record.exit_code) == ("stopped", 143)
    return len(taken)


def go_on(config: Path, run_dir: Path, *, taken: int) -> None:
    again = launch(config, run_dir, "--resume", f"steps={taken + 3}")
    try:
        output = again.communicate(timeout=100)[0].decode()
    finally:
        again.kill()
    assert again.returncode == 0, output
    assert [step["step"] for step in RunReader(run_dir).metrics()] == list(range(1, taken + 4))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(settings(data=SLOW, epochs=None, steps=5000)))
    return path


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_saves_when_its_head_is_lost_and_is_taken_up_in_another_cluster(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    run_dir = tmp_path / "run"
    with launched(config, run_dir) as process:
        replicas = [holder("cpu-0"), holder("cpu-1")]
        kill("gcs_server", process)
        taken = assert_saved(process, run_dir, lost="the Ray head")
        wait_until(lambda: all(map(is_dead, replicas)), "replicas stayed")
    go_on(config, run_dir, taken=taken)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_saves_when_its_raylet_is_lost_and_is_taken_up_in_another_cluster(config: Path, tmp_path: Path) -> None:
    """Its replicas outlive the raylet by a quarter of a minute, and are ended by then."""
    run_dir = tmp_path / "run"
    with launched(config, run_dir) as process:
        replicas = [holder("cpu-0"), holder("cpu-1")]
        kill("raylet", process)
        taken = assert_saved(process, run_dir, lost="this host's raylet")
        wait_until(lambda: all(map(is_dead, replicas)), "replicas stayed")
    go_on(config, run_dir, taken=taken)

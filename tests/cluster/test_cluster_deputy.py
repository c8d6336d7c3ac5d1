"""When a deputy takes a run over, and when it leaves it alone."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import revdist
from revdist.cluster.claim import DETACHED, RunClaim
from revdist.cluster.deputy import Charge, Vigil
from revdist.cluster.fleet import ORPHAN_S, Known, orphan_s
from revdist.cluster.run_record import read_record, write_record
from revdist.config import FaultsConfig
from revdist.training.membership import PATIENCE_S as STEP_PATIENCE_S
from revdist.training.orders import Rendezvous

SUPERVISOR = """
import sys, time
from pathlib import Path
from revdist.cluster.claim import RunClaim
from revdist.cluster.succession import Succession
from revdist.config import RunConfig
run_dir = Path(sys.argv[1])
config = RunConfig.from_mapping({
    "model": {"factory": "a:b"}, "data": {"factory": "a:b"}, "global_batch": 2, "steps": 9,
    "faults": {"heartbeat_s": 0.2},
})
with RunClaim(run_dir, name="small", log_dir=run_dir / "logs") as claim:
    with Succession(config, claim, run_dir / "logs", known=dict):
        print("up", flush=True)
        time.sleep(300)
"""
HEARTBEAT_S = 0.5
PATIENCE_S = 2.0
NFS_LEASE_S = 90.0
"""By default, how long NFS keeps the locks of a host that is gone."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def host() -> Iterator[socket.socket]:
    """What answers on the supervisor's host."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def claim(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RunClaim:
    monkeypatch.setenv(DETACHED, "1")
    return RunClaim(run_dir, name="small", log_dir=run_dir / "logs")


def orphan(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose driver is gone without a word."""
    with claim(run_dir, monkeypatch) as held:
        (run_dir / "config.yaml").touch()
        record = (run_dir / "run.json").read_text()
        assert held.record.ended_s is None
    (run_dir / "run.json").write_text(record)


def charged(run_dir: Path, port: int, **times: float) -> Vigil:
    vigil = Vigil(run_dir, heartbeat_s=HEARTBEAT_S, patience_s=PATIENCE_S, **times)
    known = {member: Known(None, address) for member, address in enumerate(("127.0.0.1", "10.0.0.2", "127.0.0.1"))}
    vigil.hear(Charge(known=known, address="127.0.0.1", port=port))
    return vigil


def closed(listener: socket.socket) -> int:
    """The port of a host that is no more."""
    port = int(listener.getsockname()[1])
    listener.close()
    return port


def test_it_takes_over_where_supervisor_host_and_lock_are_gone(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan(run_dir, monkeypatch)
    vigil = charged(run_dir, closed(host))
    began_s = time.monotonic()
    assert vigil.wait() == {0, 2}, "the replicas on its host are lost too"
    assert time.monotonic() - began_s >= HEARTBEAT_S


def test_a_supervisor_whose_host_answers_is_left_to_its_watchman(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan(run_dir, monkeypatch)
    assert charged(run_dir, host.getsockname()[1]).wait() is None


def test_one_whose_host_answers_and_whom_nobody_starts_anew_is_followed(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan(run_dir, monkeypatch)
    vigil = charged(run_dir, host.getsockname()[1], comes_back_s=2 * HEARTBEAT_S)
    began_s = time.monotonic()
    assert vigil.wait() == frozenset(), "no replica is lost"
    assert time.monotonic() - began_s >= 2 * HEARTBEAT_S


def test_one_whose_host_answers_and_who_holds_the_lock_is_busy(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim(run_dir, monkeypatch):
        assert charged(run_dir, host.getsockname()[1], comes_back_s=HEARTBEAT_S).wait() is None


def test_a_supervisor_that_is_cut_off_keeps_its_run(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim(run_dir, monkeypatch):
        assert charged(run_dir, closed(host)).wait() is None


def test_a_run_that_has_ended_is_not_begun_again(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim(run_dir, monkeypatch):
        (run_dir / "config.yaml").touch()
    assert charged(run_dir, closed(host)).wait() is None


def test_one_that_is_heard_again_and_again_is_there(
    run_dir: Path, host: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes, and though its host takes no connection."""
    orphan(run_dir, monkeypatch)
    vigil = charged(run_dir, closed(host))
    over = threading.Event()
    waiting = threading.Thread(target=lambda: (vigil.wait(), over.set()), daemon=True)
    waiting.start()
    until_s = time.monotonic() + PATIENCE_S + HEARTBEAT_S
    while time.monotonic() < until_s:
        vigil.hear()
        assert not over.is_set()
        time.sleep(0.02)
    assert over.wait(timeout=10)
    waiting.join(timeout=10)


def test_a_supervisor_whose_run_was_taken_over_leaves_without_touching_it(run_dir: Path) -> None:
    """As one that was cut off, on a file system that gave its lock away, when it can see the directory again."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(revdist.__file__).parent.parent)},
        text=True,
    )
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        record = read_record(run_dir)
        assert record is not None
        taken = dataclasses.replace(record, host="another")
        write_record(run_dir, taken)
        _, said = supervisor.communicate(timeout=30)
        assert supervisor.returncode == 1
        assert f"process {record.process.pid} on another has taken the run over" in said
        assert read_record(run_dir) == taken
    finally:
        supervisor.kill()
        supervisor.wait(timeout=10)


def test_deputy_and_replicas_wait_longer_than_nfs_keeps_a_dead_hosts_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ORPHAN_S, raising=False)
    assert orphan_s() > NFS_LEASE_S + 30 + FaultsConfig().heartbeat_s
    meeting = Rendezvous(host="", port=0, prefix="", rank=0, world_size=1)
    # A step that hangs, or whose group broke, waits until then, and half as long for the others.
    assert 1.5 * orphan_s() < min(STEP_PATIENCE_S, meeting.timeout_s)

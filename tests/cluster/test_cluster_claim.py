"""One run, one directory: who has it, how it ended, and what is left where it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import settings

import revdist
from revdist.cluster.claim import DETACHED, RunClaim, is_alive, is_superseded, refuse_living, right_to_write, state_of
from revdist.cluster.processes import Process, own_process, started_with, writing_below
from revdist.cluster.run_record import RUN_DIR, RUN_ID, read_record
from revdist.cluster.stopping import stop_run
from revdist.errors import ConfigError, Preempted, RunFailed, UsageError

DRIVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from revdist.cluster.claim import RunClaim
from revdist.errors import Preempted
run_dir, manners = Path(sys.argv[1]), sys.argv[2]
child = [sys.executable, "-c", "import time; time.sleep(300)"]
def leave(number, frame):
    raise Preempted("stopped by SIGTERM at step 3, saved: go on with --resume")
signal.signal(signal.SIGTERM, leave if manners == "polite" else signal.SIG_IGN)
with RunClaim(run_dir, name="fake", log_dir=run_dir / "logs") as claim:
    (run_dir / "config.yaml").touch()
    if manners != "polite":
        subprocess.Popen(child)
    claim.on_step({})
    claim.on_event({"kind": "restart", "restarts": int(sys.argv[3])})
    print("up", flush=True)
    time.sleep(300)
"""


class Driver:
    """A process that holds the claim of a run, as a driver does, and trains nothing."""

    def __init__(self, run_dir: Path, manners: str, *, restarts: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(run_dir), manners, str(restarts)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(revdist.__file__).parent.parent)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory; what runs in it at the end is killed."""
    folder = tmp_path / "run"
    yield folder
    record = read_record(folder) if folder.exists() else None
    if record is not None and record.process != own_process():
        record.process.send(signal.SIGKILL)
        for process in started_with(RUN_ID, record.run_id):
            process.send(signal.SIGKILL)


def claim(run_dir: Path) -> RunClaim:
    return RunClaim(run_dir, name="small", log_dir=run_dir / "logs")


def test_a_directory_that_is_taken_is_refused_with_who_has_it_and_what_to_do(run_dir: Path) -> None:
    with claim(run_dir), pytest.raises(ConfigError, match=f"process {os.getpid()} on ") as refused, claim(run_dir):
        pass
    assert f"revdist attach {run_dir}" in refused.value.message
    assert f"revdist stop {run_dir}" in refused.value.message


def test_a_living_run_is_neither_resumed_nor_overwritten(run_dir: Path) -> None:
    with claim(run_dir):
        (run_dir / "config.yaml").touch()
        for resume in (True, False):
            with pytest.raises(ConfigError, match="is running a run"):
                revdist.Trainer(settings(), run_dir=run_dir, resume=resume).fit()


def test_what_asks_whether_a_run_is_alive_does_not_disturb_it(run_dir: Path) -> None:
    assert not is_alive(run_dir)
    with claim(run_dir):
        assert is_alive(run_dir)
        assert is_alive(run_dir)
        with pytest.raises(ConfigError):
            refuse_living(run_dir)
        (run_dir / "config.yaml").touch()
    assert not is_alive(run_dir)
    with claim(run_dir):
        assert is_alive(run_dir)


def test_a_session_that_wrote_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with claim(tmp_path / "runs" / "small"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_neither_group_nor_others_can_write_there(run_dir: Path) -> None:
    with claim(run_dir):
        modes = {path: path.stat().st_mode & 0o777 for path in (run_dir, *run_dir.iterdir())}
    assert modes == {run_dir: 0o750, run_dir / "run.json": 0o640, run_dir / "run.lock": 0o640}


@pytest.mark.parametrize(
    ("ending", "state", "exit_code", "said"),
    [
        (None, "done", 0, ()),
        (RunFailed("it broke; mend it", rank=1, host="b"), "failed", 1, ("rank 1 on b: it broke", "mend it")),
        (ConfigError("wrong"), "failed", 2, ("wrong",)),
        (Preempted("stopped by SIGTERM"), "stopped", 143, ("stopped by SIGTERM",)),
        (KeyboardInterrupt("saved"), "stopped", 130, ("interrupted: saved",)),
        (KeyError("boom"), "failed", 1, None),
    ],
)
def test_how_a_session_ended_is_written_down(
    run_dir: Path, ending: BaseException | None, state: str, exit_code: int, said: tuple[str, ...] | None
) -> None:
    def session() -> None:
        with claim(run_dir):
            (run_dir / "config.yaml").touch()
            if ending is not None:
                raise ending

    if ending is None:
        session()
    else:
        with pytest.raises(type(ending)):
            session()
    record = read_record(run_dir)
    assert record is not None
    assert (record.state, record.exit_code) == (state, exit_code)
    assert said is None or record.error == said
    assert state_of(run_dir, record) == state
    assert RUN_ID not in os.environ


def test_a_killed_driver_leaves_a_lost_run_whose_directory_is_free(run_dir: Path) -> None:
    driver = Driver(run_dir, "polite")
    record = read_record(run_dir)
    assert record is not None
    assert state_of(run_dir, record) == "running"
    driver.process.kill()
    driver.process.wait(timeout=10)
    assert state_of(run_dir, record) == "lost"
    with claim(run_dir):
        assert is_alive(run_dir)


def test_who_takes_over_goes_on_counting_restarts_and_a_new_session_does_not(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DETACHED, "1")
    counts = []
    for restarts in (1, 2):
        driver = Driver(run_dir, "polite", restarts=restarts)
        driver.process.kill()
        driver.process.wait(timeout=10)
        with claim(run_dir) as next_one:
            counts.append(next_one.record.restarts)
            next_one.on_event({"kind": "joined"})
            counts.append(next_one.record.restarts)
    with claim(run_dir) as another:
        counts.append(another.record.restarts)
    assert counts == [1, 1, 2, 2, 0]


def test_stop_lets_a_run_leave_by_itself(run_dir: Path) -> None:
    driver = Driver(run_dir, "polite")
    stopped = stop_run(run_dir, now=False, timeout_s=20)
    assert driver.process.wait(timeout=10) == 1  # the traceback of the interpreter, here
    assert (stopped.was_alive, stopped.num_killed) == (True, 0)
    assert (stopped.record.state, stopped.record.exit_code) == ("stopped", 143)


@pytest.mark.parametrize(("now", "timeout_s"), [(True, 100.0), (False, 0.3)])
def test_what_does_not_leave_is_killed_with_all_that_it_started(run_dir: Path, now: bool, timeout_s: float) -> None:
    driver = Driver(run_dir, "stubborn")
    record = read_record(run_dir)
    assert record is not None
    (child,) = started_with(RUN_ID, record.run_id)
    stopped = stop_run(run_dir, now=now, timeout_s=timeout_s)
    assert driver.process.wait(timeout=10) == -signal.SIGKILL
    assert not child.alive
    assert stopped.num_killed == 2
    assert stopped.record.state == "stopped"
    assert "without saving" in stopped.record.error[0]
    assert stop_run(run_dir, now=now, timeout_s=timeout_s).was_alive is False


def test_stop_ends_what_a_killed_driver_has_left(run_dir: Path) -> None:
    driver = Driver(run_dir, "stubborn")
    driver.process.kill()
    driver.process.wait(timeout=10)
    stopped = stop_run(run_dir, now=False, timeout_s=20)
    assert (stopped.was_alive, stopped.num_killed) == (False, 1)


def test_stop_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run has been started"):
        stop_run(tmp_path, now=False, timeout_s=1)


def test_a_process_is_not_taken_for_another_one_with_its_number() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        found = Process.of(process.pid)
        assert found is not None
        assert found.alive
        namesake = Process(pid=process.pid, started="another boot:1")
        assert not namesake.alive
        assert not namesake.send(signal.SIGKILL)
        assert process.poll() is None
        assert found.send(signal.SIGKILL)
        until_s = time.monotonic() + 10
        while found.alive and time.monotonic() < until_s:  # a dead child that nobody has collected does not count
            time.sleep(0.01)
        assert not found.alive
    finally:
        process.kill()
        process.wait(timeout=10)


def test_processes_are_found_by_the_files_that_they_have_open(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=log)
    try:
        assert [found.pid for found in writing_below(str(tmp_path))] == [process.pid]
        assert writing_below(str(tmp_path / "lo")) == []
    finally:
        process.kill()
        process.wait(timeout=10)


def test_who_is_left_of_a_run_may_write_it_while_nobody_supervises_it(run_dir: Path) -> None:
    with claim(run_dir) as held:
        run_id = held.record.run_id
        (run_dir / "config.yaml").touch()
        assert (os.environ[RUN_ID], os.environ[RUN_DIR]) == (run_id, str(run_dir))
        with right_to_write(run_dir, run_id, patience_s=0) as mine:
            assert not mine, "its supervisor lives"
    assert RUN_DIR not in os.environ
    with right_to_write(run_dir, run_id, patience_s=0) as mine:
        assert mine
        with pytest.raises(ConfigError, match="is running a run"):
            claim(run_dir).__enter__()
        with right_to_write(run_dir, run_id, patience_s=0) as another:
            assert not another
    with right_to_write(run_dir.with_name("elsewhere"), run_id, patience_s=0) as mine:
        assert not mine, "it is not seen from here"


def test_a_directory_that_another_run_has_taken_is_left_to_it(run_dir: Path) -> None:
    with claim(run_dir) as first:
        (run_dir / "config.yaml").touch()
        assert not is_superseded(run_dir, first.record.run_id)
    with claim(run_dir) as second:
        assert is_superseded(run_dir, first.record.run_id)
        assert not is_superseded(run_dir, second.record.run_id)
    with right_to_write(run_dir, first.record.run_id, patience_s=0) as mine:
        assert not mine

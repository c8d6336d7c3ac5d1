"""One run, one directory: the lock that a run holds on the place where it writes, and the record it keeps there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from revdist.cluster.failure_lines import failure_lines
from revdist.cluster.observer import Observer
from revdist.cluster.processes import own_process
from revdist.cluster.run_record import FILE, RUN_DIR, RUN_ID, RunRecord, State, read_record, write_record
from revdist.errors import ConfigError, Preempted, RevdistError, UsageError

LOCK = "run.lock"
DETACHED = "REVDIST_DETACHED"
"""Set for a driver that `revdist launch --detach` has started."""
_ATTEMPTS, _PAUSE_S = 10, 0.02
"""Whoever asks whether a run is alive holds its lock for a moment."""


def is_alive(run_dir: Path) -> bool:
    """Whether a process, on whatever host that sees the directory, runs a run there."""
    try:
        lock = os.open(run_dir / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: what the record says is then all there is
        record = read_record(run_dir)
        return record is not None and record.ended_s is None and record.here and record.process.alive
    finally:
        os.close(lock)


def state_of(run_dir: Path, record: RunRecord) -> State:
    """What a session is up to: what it wrote down itself, unless it was killed before it could write its end."""
    if record.ended_s is not None or is_alive(run_dir):
        return record.state
    return "lost"


def is_orphaned(run_dir: Path) -> bool:
    """Whether a detached run was left by a driver that was killed: its replicas may be alive."""
    record = read_record(run_dir)
    return record is not None and record.detached and record.ended_s is None and not is_alive(run_dir)


def refuse_living(run_dir: Path) -> None:
    """Raise ConfigError, saying whose it is, where a run is alive in a directory."""
    if is_alive(run_dir):
        raise _taken(run_dir)


def is_superseded(run_dir: Path, run_id: str) -> bool:
    """Whether another run than this one has taken the directory, as far as this host sees it."""
    try:
        record = read_record(run_dir)
    except UsageError:
        return False
    return record is not None and record.run_id != run_id


@contextlib.contextmanager
def right_to_write(run_dir: Path, run_id: str, *, patience_s: float) -> Iterator[bool]:
    """For a replica of a run that nobody supervises: whether it may write the directory, alone, until the end.

    Not where a supervisor is alive, on whatever host, nor where another run has taken the directory or it cannot be
    seen from here. Others that are left of the run are waited for.
    """
    lock = _lock_of_nobody(run_dir, patience_s)
    try:
        yield lock is not None and not is_superseded(run_dir, run_id)
    finally:
        if lock is not None:
            os.close(lock)


def _lock_of_nobody(run_dir: Path, patience_s: float) -> int | None:
    until_s = time.monotonic() + patience_s
    while (run_dir / FILE).exists():
        try:
            return _take_lock(run_dir)
        except ConfigError:
            if time.monotonic() > until_s:
                return None
        except OSError:
            return None
    return None


@final
class RunClaim(Observer):
    """A run directory taken for one session of a run. Use it as a context manager.

    Entering makes the directory and takes its lock, and raises ConfigError where another run has it
    or it cannot be made. Leaving writes down how the session ended; a directory in which nothing was
    written but its own two files is removed again.
    """

    def __init__(self, run_dir: Path, *, name: str, log_dir: Path) -> None:
        self.run_dir = run_dir
        self._lock: int | None = None
        self._made: list[Path] = []
        self._environment: dict[str, str | None] = {}
        self._changing = threading.Lock()
        before = read_record(run_dir)
        self.orphans = before.run_id if before is not None and is_orphaned(run_dir) else None
        """The run whose replicas may live on: its driver was killed."""
        given = os.environ.get(RUN_ID) if DETACHED in os.environ else None
        self.record = RunRecord(
            name=name,
            run_id=self.orphans or given or secrets.token_hex(8),
            host=socket.gethostname(),
            process=own_process(),
            state="starting",
            began_s=time.time(),
            log_dir=str(log_dir),
            detached=DETACHED in os.environ or self.orphans is not None,
            restarts=before.restarts if before is not None and self.orphans is not None else 0,
        )

    def __enter__(self) -> Self:
        try:
            self._make()
            self._lock = _take_lock(self.run_dir)
            write_record(self.run_dir, self.record)
        except OSError as error:
            raise ConfigError(
                f"cannot write the run directory {self.run_dir}: {error.strerror}; choose another with --run-dir"
            ) from error
        told = {RUN_ID: self.record.run_id, RUN_DIR: str(self.run_dir)}
        self._environment = {name: os.environ.get(name) for name in told}
        os.environ.update(told)
        return self

    def update(self, **changes: Any) -> None:
        """Write down something new about the session, as fields of its record, from any thread.

        A full disk does not end the run.
        """
        with self._changing:
            self.record = dataclasses.replace(self.record, **changes)
            with contextlib.suppress(OSError):
                write_record(self.run_dir, self.record)

    @property
    def successor(self) -> RunRecord | None:
        """The session that has taken the directory over, since this one seemed lost; None: it has not.

        The lock of a host that is cut off may be given to another one after a while, as NFS does.
        """
        try:
            newest = read_record(self.run_dir)
        except UsageError:
            return None
        if newest is None or (newest.host, newest.process) == (self.record.host, self.record.process):
            return None
        return newest

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """The run is under way from its first step on."""
        if self.record.state == "starting":
            self.update(state="running")

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Who takes the run over goes on counting where this session was."""
        if event.get("restarts", self.record.restarts) != self.record.restarts:
            self.update(restarts=event["restarts"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        state, exit_code, lines = _ending(error)
        self.update(state=state, exit_code=exit_code, error=lines, ended_s=time.time())
        self._remove_if_unused()
        if self._lock is not None:
            os.close(self._lock)

    def _make(self) -> None:
        missing = [path for path in (self.run_dir, *self.run_dir.parents) if not path.exists()]
        self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._made = missing

    def _remove_if_unused(self) -> None:
        if self._made and {path.name for path in self.run_dir.iterdir()} <= {FILE, LOCK}:
            with contextlib.suppress(OSError):
                (self.run_dir / FILE).unlink(missing_ok=True)
                (self.run_dir / LOCK).unlink(missing_ok=True)
                for path in self._made:
                    path.rmdir()


def _take_lock(run_dir: Path) -> int:
    """File descriptor of the lock, held until it is closed or the process ends, however that comes about."""
    path = run_dir / LOCK
    for _ in range(_ATTEMPTS):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            time.sleep(_PAUSE_S)
            continue
        except OSError:  # a file system without locks
            if is_alive(run_dir):
                os.close(lock)
                break
            return lock
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)  # whoever held it has just removed it
    raise _taken(run_dir)


def _taken(run_dir: Path) -> ConfigError:
    record = read_record(run_dir)
    who = "another process" if record is None else f"process {record.process.pid} on {record.host}"
    return ConfigError(
        f"{who} is running a run in {run_dir}; watch it with `revdist attach {run_dir}`, "
        f"end it with `revdist stop {run_dir}`, or choose another --run-dir"
    )


def _ending(error: BaseException | None) -> tuple[State, int, tuple[str, ...]]:
    """State, exit code and words of a session that ends with an error, or without one."""
    if error is None:
        return "done", 0, ()
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130, (f"interrupted: {error}" if str(error) else "interrupted",)
    if isinstance(error, Preempted):
        return "stopped", error.exit_code, tuple(failure_lines(error))
    return "failed", error.exit_code if isinstance(error, RevdistError) else 1, tuple(failure_lines(error))

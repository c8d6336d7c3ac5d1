"""Runs that go on without the terminal that started them: `revdist launch` in a session of its own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import final

from revdist.cluster.claim import DETACHED, is_orphaned
from revdist.cluster.run_record import RUN_ID, RunRecord, read_record
from revdist.errors import ConfigError, RunFailed

LAUNCHER_LOG = "launcher.log"
_TICK_S = 0.1
_LOG_LINES = 3
_GIVE_UP_S = 30.0
"""Time for a run that is still starting to leave when it is told to."""


@final
class DetachedRun:
    """A driver that was started in the background, as seen by the process that started it."""

    def __init__(self, arguments: Sequence[str], run_dir: Path, log_dir: Path, *, cores: int | None) -> None:
        """Start `revdist` with these arguments, in the current folder, its output going to a file of `log_dir`.

        cores: that a Ray cluster of its own must offer; None: the arguments name another one.
        Raises ConfigError where the file cannot be written, UsageError where the directory's record is none.
        """
        self.run_dir = run_dir
        self.log = log_dir / LAUNCHER_LOG
        self._before = read_record(run_dir)
        # The replicas of a driver that was killed have the id of their run, and the new driver takes it over.
        orphans = self._before if is_orphaned(run_dir) else None
        self._run_id = secrets.token_hex(8) if orphans is None else orphans.run_id
        command = ["-m", "revdist.cluster.watchman", "-" if cores is None else str(cores), str(run_dir), *arguments]
        try:
            run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
            log_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        except OSError as error:
            raise ConfigError(f"cannot write {self.log}: {error.strerror}; choose another --run-dir") from error
        try:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, DETACHED: "1", RUN_ID: self._run_id},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal that closes, and its Ctrl-C, do not reach it
            )
        finally:
            os.close(log)

    def wait_until_under_way(self) -> RunRecord:
        """The record of the run once it has taken its first step, or has ended.

        Raises RunFailed where it ended without a word. On Ctrl-C the run is told to leave as well.
        """
        try:
            while True:
                record = self._record()
                if record is not None and record.state != "starting":
                    return record
                if self._process.poll() is not None:
                    return self._record() or self._ended_without_a_word()
                time.sleep(_TICK_S)
        except KeyboardInterrupt:
            self._process.terminate()
            self._process.wait(timeout=_GIVE_UP_S)
            raise

    def _record(self) -> RunRecord | None:
        """What the driver has written; None: nothing yet."""
        record = read_record(self.run_dir)
        if record is None or record.run_id != self._run_id:
            return None
        return record if self._before is None or record.process != self._before.process else None

    def _ended_without_a_word(self) -> RunRecord:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LOG_LINES:]
        raise RunFailed(
            f"the run's driver ended with exit code {self._process.returncode} before it was under way; "
            + "; ".join([*lines, f"all it said is in {self.log}"])
        )

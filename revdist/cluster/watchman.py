"""The parent of a detached run's driver: keeps the Ray cluster of the run, and starts the driver anew if it dies.

Replicas of a detached run outlive their driver. One that was killed comes back in seconds and finds them
training; it does not come back where it ended by itself, whatever the reason it gave, nor where it was told to leave.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from revdist.cluster.local import addresses, ray_cluster, session_folder
from revdist.cluster.run_record import RAY_SESSION
from revdist.cluster.way_out import leave

_RESTARTS = 5
_PAUSE_S = 0.2
_TO_LEAVE = (signal.SIGTERM, signal.SIGINT)
"""Whoever sends one wants the run to end; a second one ends the driver before it has saved."""


def main(arguments: Sequence[str]) -> int:
    """arguments: cores that a cluster of the run's own must offer, or `-` where it uses another one; the run
    directory; and those of `revdist` for the driver. Returns the driver's exit code.
    """
    cores, run_dir, *command = arguments
    if cores == "-":
        return _watch(command, Path(run_dir))
    with ray_cluster(None, num_workers=int(cores)):
        os.environ[RAY_SESSION] = session_folder()
        return _watch([*command, f"--address={addresses().head}"], Path(run_dir))


def _watch(command: list[str], run_dir: Path) -> int:
    driver = _start(command)
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        driver.send_signal(number)

    for number in _TO_LEAVE:
        signal.signal(number, pass_on)
    for _ in range(_RESTARTS):
        code = driver.wait()
        if code >= 0 or -code in _TO_LEAVE or not (run_dir / "config.yaml").exists():
            break
        time.sleep(_PAUSE_S)
        if told:
            break
        sys.stderr.write(f"the driver was killed by signal {-code}: starting another one\n")
        driver = _start([*command, *(["--resume"] if "--resume" not in command else [])])
    code = driver.wait()
    return code if code >= 0 else 128 - code


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "revdist.cli", *command], stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    leave(SystemExit(main(sys.argv[1:])))

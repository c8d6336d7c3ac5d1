"""Another process that takes memory of a CPU device, to rehearse what a neighbour does to a run.

    python -m revdist.devices.co_tenant --device cpu-0 --take 20MiB [--seconds 5]

It takes memory as it becomes free, prints one line once it holds all of it, and gives it back when its
standard input closes, on SIGTERM, or after `--seconds`. Killed in any other way, its memory is free as well.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from revdist.devices.allocator import load_allocator
from revdist.devices.cpu import CpuDevice
from revdist.errors import DeviceError, RevdistError, format_bytes
from revdist.sizes import parse_bytes

_CHUNK_BYTES = 2**20
_RETRY_S = 0.002


class CoTenant:
    """Memory of a CPU device, held by this process."""

    def __init__(self, device: CpuDevice) -> None:
        device.activate("co-tenant")
        self._device = device
        self._chunks: list[Any] = []
        self.held_bytes = 0

    def take(self, num_bytes: int, *, patience_s: float) -> None:
        """Takes and touches memory, a piece at a time as it becomes free.

        Raises DeviceError if it is not all there in time; what it got is held until `give_back`.
        """
        deadline_s = time.monotonic() + patience_s
        wanted_bytes = self.held_bytes + num_bytes
        while self.held_bytes < wanted_bytes:
            if self._take_chunk(min(_CHUNK_BYTES, wanted_bytes - self.held_bytes)):
                continue
            if time.monotonic() > deadline_s:
                raise DeviceError(
                    f"got {format_bytes(self.held_bytes)} of {format_bytes(wanted_bytes)} on {self._device.name} "
                    f"in {patience_s:g} s: take less, or wait longer with --patience"
                )
            time.sleep(_RETRY_S)
        self._device.read()  # publishes the last piece where nothing is enforced

    def give_back(self) -> None:
        if self._device.enforced:
            for address in self._chunks:
                load_allocator().give_back(address)
        self._chunks.clear()
        self.held_bytes = 0
        self._device.deactivate()

    def _take_chunk(self, num_bytes: int) -> bool:
        if self._device.enforced:
            chunk: Any = load_allocator().take(num_bytes)
        else:
            fits = self._device.read().free_bytes >= num_bytes
            chunk = bytearray(b"\1") * num_bytes if fits else None
        if chunk is None:
            return False
        self._chunks.append(chunk)
        self.held_bytes += num_bytes
        return True


class _Terminated(Exception):
    """SIGTERM came."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the co-tenant. Returns the exit code: 0 held and gave back, 1 could not, 2 wrong usage."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _terminate)  # ends whatever wait it falls into
    tenant: CoTenant | None = None
    try:
        num_bytes = parse_bytes(options.take)
        tenant = CoTenant(CpuDevice.open(options.device))
        tenant.take(num_bytes, patience_s=options.patience)
        _say(f"co-tenant {os.getpid()} holds {format_bytes(num_bytes)} of {options.device}")
        _wait(options.seconds)
    except (_Terminated, KeyboardInterrupt):
        pass
    except RevdistError as error:
        sys.stderr.write(f"co-tenant: {error}\n")
        return error.exit_code
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if tenant is not None:
            tenant.give_back()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m revdist.devices.co_tenant", description="Hold memory of a CPU device until the input ends."
    )
    parser.add_argument("--device", required=True, help="name of the CPU device, cpu-0")
    parser.add_argument("--take", required=True, help="how much to hold, 20MiB")
    parser.add_argument("--seconds", type=float, help="give it back after that long, not at the end of the input")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for the memory (default 30)")
    return parser.parse_args(arguments)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _wait(seconds: float | None) -> None:
    if seconds is not None:
        time.sleep(seconds)
        return
    while True:
        select.select([sys.stdin], [], [])
        if not os.read(sys.stdin.fileno(), 4096):
            return


if __name__ == "__main__":
    sys.exit(main())

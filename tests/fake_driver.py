"""A machine with GPUs for tests: the fake driver library, and what it says is there.

Its GPUs take their memory and processes from CPU devices' ledgers, so what a process charges to a CPU device is
seen by nvidia-ml-py, by Ray and by revdist's NVML code as GPU memory. The dynamic linker finds the library through
LD_LIBRARY_PATH when a process starts: `call` runs a function in a process of its own, and Ray actors get `env`.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from revdist.devices.build import NATIVE

T = TypeVar("T")
SOURCES = Path(__file__).parent / "devices" / "fake_nvml"
NVML_CODES = {
    "uninitialized": 1,
    "not-supported": 3,
    "no-permission": 4,
    "not-found": 6,
    "driver-not-loaded": 9,
    "function-not-found": 13,
    "gpu-is-lost": 15,
    "reset-required": 16,
    "mismatch": 18,
    "unknown": 999,
}


def build_library(folder: Path) -> None:
    """Compiles libnvidia-ml.so.1 into the folder."""
    subprocess.run(
        [
            *("gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{NATIVE}"),
            *sorted(map(str, SOURCES.glob("*.c"))),
            *("-o", str(folder / "libnvidia-ml.so.1")),
        ],
        check=True,
    )


class FakeDriver:
    """What the driver library says there is; any process may change it while others use it."""

    def __init__(self, library_folder: Path, folder: Path) -> None:
        self.env = {
            "LD_LIBRARY_PATH": str(library_folder),
            "FAKE_NVML_CONTROL": str(folder / "nvml-control"),
            "FAKE_NVML_TRACE": str(folder / "nvml-trace"),
        }
        self._control = Path(self.env["FAKE_NVML_CONTROL"])
        self._control.touch()

    def add_gpu(self, ledger: Path, *, name: str = "NVIDIA A100-SXM4-40GB", gpu: str = "") -> str:
        """A GPU with the memory of that ledger. Returns its UUID."""
        gpu = gpu or f"GPU-{uuid.uuid4()}"
        self._append(f"gpu {gpu} {ledger} {name}")
        return gpu

    def add_mig(self, gpu: str, ledger: Path, *, name: str = "NVIDIA A100-SXM4-40GB MIG 1g.5gb") -> str:
        """An instance of a GPU that is thereby split. Returns its UUID."""
        instance = f"MIG-{uuid.uuid4()}"
        self._append(f"mig {instance} {gpu} {ledger} {name}")
        return instance

    def fail(self, error: str, *, device: str = "*", function: str = "") -> None:
        """Every call about the device, or that function alone, fails from now on."""
        self._append(f"fault {device} {NVML_CODES[error]} {function}")

    def report_xid(self, gpu: str, number: int) -> None:
        self._append(f"xid {gpu} {number}")

    def repair(self) -> None:
        """Nothing fails any more."""
        kept = [line for line in self._control.read_text().splitlines(keepends=True) if not line.startswith("fault")]
        draft = self._control.with_suffix(".draft")
        draft.write_text("".join(kept))
        draft.replace(self._control)

    def calls(self) -> list[tuple[str, str]]:
        """Every call so far: the function, and the UUID it was about."""
        lines = Path(self.env["FAKE_NVML_TRACE"]).read_text().splitlines()
        return [(function, device) for function, device in (line.split() for line in lines)]

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs a function of an importable module in a new process under the driver; its errors come back as well."""
        with (
            mock.patch.dict(os.environ, self.env),
            concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process,
        ):
            return process.submit(function, *arguments).result()

    def _append(self, line: str) -> None:
        with self._control.open("a") as file:
            file.write(f"{line}\n")

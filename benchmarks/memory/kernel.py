"""The kernel's word on the peak of a step: VmHWM of a process that nothing else has run in.

Without the ledger, and with every block of 64 KiB or more mapped by itself, so that what is freed leaves
the process at once. Slow, for each such block is faulted in anew.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.networks import network
from benchmarks.memory.schedules import Trial
from revdist.reversible.chain import find_chain

M_MMAP_THRESHOLD = -3
MAPPED_FROM_BYTES = 65536
FORGET_PEAK = "5"
"""Written to clear_refs: VmHWM starts anew at what is resident now."""
WARM_UP_STEPS = 2


def kernel_peak(trial: Trial) -> int:
    """Peak bytes of one step over what is resident before it; the batch, which is there before, included."""
    with fresh_processes().Pool(1) as pool:
        return pool.apply(_measure, (trial,))


def fresh_processes() -> Any:
    """Processes that start with everything imported and nothing run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory.kernel", "benchmarks.memory.training"])
    return context


def _measure(trial: Trial) -> int:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    torch.set_num_threads(1)
    made = network(trial.network).make()
    made.lay_out_gradients()
    find_chain(made.model).set_schedule(trial.modes)
    for _ in range(WARM_UP_STEPS):  # brings in code, and what libraries allocate once
        made.step()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(FORGET_PEAK)
    before = _high_water_bytes()
    made.step()
    return _high_water_bytes() - before + made.inputs.untyped_storage().nbytes()


def _high_water_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

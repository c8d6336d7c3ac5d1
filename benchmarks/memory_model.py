"""Hold the model of memory and time to what is measured: on four networks, step by step and training as a whole.

python benchmarks/memory_model.py            writes tables, a figure and the raw numbers
python benchmarks/memory_model.py --quick    two networks and few schedules
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.memory.figure import draw
from benchmarks.memory.measuring import Effort, Finding, examine
from benchmarks.memory.networks import NETWORKS, network
from benchmarks.memory.result import Result
from benchmarks.memory.training import Whole, train, whole_trainings
from benchmarks.provenance import RESULTS, provenance
from revdist.devices import open_device

COMMAND = "python benchmarks/memory_model.py"
CAPACITY_BYTES = 8 * 2**30
FULL = Effort(num_random=6, num_planned=5, rounds=5)
QUICK = Effort(num_random=3, num_planned=3, rounds=2)
QUICK_NETWORKS = ("revnet38", "reformer")
METHOD = (
    "Each network is profiled and schedules are drawn at random and planned for budgets, once with all modes and "
    "once without OFFLOAD. Predicted peaks (planning.replay) are set against the most that the CPU device's ledger "
    "counted during a step over what was there before it, and, without OFFLOAD, against the kernel's VmHWM of a fresh "
    "process without the ledger; there, what is not a tensor counts too (Python, the autograd graph, page rounding "
    "and the scratch memory of libraries), for which a run keeps a margin of 1 MiB and 2%. Times are process CPU time, "
    "medians over rounds that profile and run every schedule in turn. Whole trainings run data parallelism with one "
    "process; their peak is predicted before the first step."
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(1)
    console = Console(width=150)
    effort = QUICK if options.quick else FULL
    keys = options.networks or (QUICK_NETWORKS if options.quick else [each.key for each in NETWORKS])
    with console.status("") as status:
        findings = _examine(keys, effort, status.update)
        wholes = _train(status.update, options.quick)
    about = provenance(["revdist", "torch"]) | {"command": COMMAND, "method": METHOD}
    result = Result(about=about, findings=tuple(findings), wholes=tuple(wholes))
    for table in result.tables():
        console.print(table.for_terminal())
    name = f"memory-model-{about['date'][:10]}"
    paths = result.write(options.out, name, figure=f"{name}.png")
    draw(findings, options.out / f"{name}.png")
    console.print("written: " + ", ".join(str(path) for path in [*paths, options.out / f"{name}.png"]))


def _examine(keys: Sequence[str], effort: Effort, say: Callable[[str], None]) -> list[Finding]:
    findings = []
    with tempfile.TemporaryDirectory() as folder:  # a ledger that nobody else sees
        device = open_device(name="memory-model", capacity_bytes=CAPACITY_BYTES, directory=folder)
        device.activate()
        for key in keys:
            findings += examine(network(key), device.meter(), effort, say)
        device.deactivate()
    return findings


def _train(say: Callable[[str], None], quick: bool) -> list[Whole]:
    wholes = []
    for key, optimizer, as_view in whole_trainings()[: 2 if quick else None]:
        say(f"training {network(key).label} with {optimizer}")
        wholes.append(train(key, optimizer, as_view))
    return wholes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two networks, few schedules: a minute or two")
    parser.add_argument("--networks", nargs="+", choices=[each.key for each in NETWORKS])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Time from the command to the end of the first optimizer step: revdist beside torchrun.

python benchmarks/start.py             writes a table and the raw numbers
python benchmarks/start.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.page import page
from benchmarks.provenance import RESULTS, ROOT, command_line, provenance
from benchmarks.quartiles import quartiles
from benchmarks.table import Table
from revdist.training.run_directory import RunReader

COMMAND = "python benchmarks/start.py"
GOAL = 1.3
"""Most that revdist may take, as a multiple of torchrun's time."""
METHOD = (
    "Both train the same RevNet for digits on the same data with the same global batch, on two CPU processes with "
    "DistributedDataParallel over gloo, one thread each. Seconds from the command to the end of the first optimizer "
    "step. Ways take turns, each round in another order; ratios are medians of those within rounds, with the quartiles "
    "over rounds."
)
TORCHRUN, KNOWN, UNSEEN = "torchrun", "revdist, profile in its cache", "revdist, model never seen"
GLOBAL_BATCH = 64
STEPS_TO_PROFILE = 8
"""By which a model has been measured between them."""
CONFIG = {
    "name": "start",
    "model": {"factory": "revdist.models:revnet_digits"},
    "data": {"factory": "revdist.training.datasets:digits"},
    "optimizer": {"factory": "torch.optim:SGD", "kwargs": {"lr": 0.1, "momentum": 0.9}},
    "global_batch": GLOBAL_BATCH,
    "steps": 2,
    "evaluate": False,
    "devices": [{"kind": "cpu", "name": f"start-{number}", "capacity": "512MiB"} for number in range(2)],
}

TORCHRUN_WORKER = f"""
import json, sys, time
import torch, torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from revdist.models import revnet_digits
from revdist.training.datasets import digits

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
train, _ = digits()
model = DistributedDataParallel(revnet_digits())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(train, batch_size={GLOBAL_BATCH // 2}, sampler=DistributedSampler(train))
images, labels = next(iter(loader))
F.cross_entropy(model(images), labels).backward()
optimizer.step()
if dist.get_rank() == 0:
    json.dump(time.time(), open(sys.argv[1], "w"))
dist.barrier()
dist.destroy_process_group()
"""

Seconds = Mapping[str, Sequence[float]]
"""Per way, one number a round."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    about = provenance(["torch", "ray", "revdist"]) | {"command": command_line(COMMAND, arguments), "method": METHOD}
    with tempfile.TemporaryDirectory() as name:
        seconds = _measure(Path(name), options.rounds)
    table = as_table(seconds)
    Console(width=120).print(table.for_terminal())
    _write(options.out, about, seconds, table)


def as_table(seconds: Seconds) -> Table:
    rows = [
        [way, f"{statistics.median(times):.1f}", _ratio(times, seconds[TORCHRUN]), _goal(way, times, seconds[TORCHRUN])]
        for way, times in seconds.items()
    ]
    columns = ["start to first step", "median, s", "of torchrun's", f"goal: at most {GOAL}"]
    return Table(title="From the command to the first step", columns=columns, rows=rows,
                 colors={"met": "green", "missed": "red"})  # fmt: skip


def _measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Caches are filled before: what is compiled once on a machine is compiled, and one has no profile left."""
    known, unseen = folder / "known", folder / "unseen"
    _revdist(folder, known, "before", f"steps={STEPS_TO_PROFILE}")
    if not any(known.glob("profile-*")):
        raise SystemExit(f"no profile after {STEPS_TO_PROFILE} steps")
    ways: dict[str, Callable[[str], float]] = {
        TORCHRUN: lambda name: _torchrun(folder, name),
        KNOWN: lambda name: _revdist(folder, known, name),
        UNSEEN: lambda name: _revdist(folder, _without_profiles(known, unseen), name),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = list(ways)
    for number in range(rounds):
        for way in order:
            seconds[way].append(ways[way](str(number)))
        order = [*order[1:], order[0]]
    return seconds


def _without_profiles(cache: Path, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy, ignore=shutil.ignore_patterns("profile-*"))
    return copy


def _torchrun(folder: Path, name: str) -> float:
    script, out = folder / "worker.py", folder / f"torchrun-{name}.json"
    script.write_text(TORCHRUN_WORKER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    began_s = time.time()
    _run([*command, str(script), str(out)], _environment(folder, folder / "none"))
    return float(json.loads(out.read_text(encoding="utf-8"))) - began_s


def _revdist(folder: Path, cache: Path, name: str, *changes: str) -> float:
    config, run_dir = folder / "start.json", folder / f"run-{name}-{cache.name}"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    command = [sys.executable, "-m", "revdist.cli", "launch", str(config), "--run-dir", str(run_dir), *changes]
    began_s = time.time()
    _run(command, _environment(folder, cache))
    return float(next(RunReader(run_dir).metrics())["time"]) - began_s


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _environment(folder: Path, cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "REVDIST_CACHE_DIR": str(cache),
        "REVDIST_DEVICES_DIR": str(folder / "devices"),
    }


def _ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, base, strict=True)]


def _ratio(times: Sequence[float], base: Sequence[float]) -> str:
    low, middle, high = quartiles(_ratios(times, base))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _goal(way: str, times: Sequence[float], base: Sequence[float]) -> str:
    if way == TORCHRUN:
        return ""
    return "met" if statistics.median(_ratios(times, base)) <= GOAL else "missed"


def _write(folder: Path, about: dict[str, Any], seconds: Seconds, table: Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"start-{about['date'][:10]}"
    content = {"about": about, "seconds": seconds}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page("Time to the first step", about, [table]), encoding="utf-8")


if __name__ == "__main__":
    main()

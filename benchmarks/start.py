"""Time from the command to the end of the first optimizer step: revdist beside torchrun.

    python benchmarks/start.py [--rounds 5] [--out benchmarks/results/start.json]

Both train the same reversible network on the same data with the same global batch, on two CPU
processes with DistributedDataParallel over gloo. Rounds are interleaved; the table shows medians.
revdist is measured with a cached profile, as every run but the first has it, and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from provenance import ROOT, provenance

from revdist.training.run_directory import RunReader

GLOBAL_BATCH = 64
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = _measure(folder, options.rounds)
    result = {"provenance": provenance(["torch", "ray", "revdist"]), "seconds": times, "medians": _medians(times)}
    _show(result["medians"])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds per launcher, one entry a round."""
    first_profile = _revdist(folder, "cold")
    _revdist(folder, "cached")  # fills the cache that the rounds use
    launchers: dict[str, Callable[[int], float]] = {
        "torchrun": lambda number: _torchrun(folder, number),
        "revdist": lambda number: _revdist(folder, "cached", number),
    }
    times: dict[str, list[float]] = {name: [] for name in launchers}
    for number in range(rounds):
        for name, launch in launchers.items():
            times[name].append(launch(number))
    return {**times, "revdist, first profile": [first_profile]}


def _torchrun(folder: Path, number: int) -> float:
    script, out = folder / "worker.py", folder / f"torchrun-{number}.json"
    script.write_text(TORCHRUN_WORKER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    began = time.time()
    _run([*command, str(script), str(out)], _environment(folder, "none"))
    return float(json.loads(out.read_text(encoding="utf-8"))) - began


def _revdist(folder: Path, cache: str, number: int = -1) -> float:
    config, run_dir = folder / "start.json", folder / f"run-{cache}-{number}"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    command = [sys.executable, "-m", "revdist.cli", "launch", str(config), "--run-dir", str(run_dir)]
    began = time.time()
    _run(command, _environment(folder, cache))
    return float(next(RunReader(run_dir).metrics())["time"]) - began


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _environment(folder: Path, cache: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "REVDIST_CACHE_DIR": str(folder / f"cache-{cache}"),
        "REVDIST_DEVICES_DIR": str(folder / "devices"),
    }


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _show(medians: dict[str, float]) -> None:
    print(f"{'start to first step':28}{'seconds':>8}{'ratio':>8}")
    for name, seconds in medians.items():
        print(f"{name:28}{seconds:8.1f}{seconds / medians['torchrun']:8.2f}")


if __name__ == "__main__":
    main()

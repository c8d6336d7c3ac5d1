"""A run directory as the schema has it: two unequal devices, memory taken from one and given back."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

MIB = 2**20
START = 1_700_000_000.0
OPERATORS = 14
DEVICES = [
    {"rank": rank, "device": f"CPU-{rank:04d}", "name": f"cpu-{rank}", "host": "node-a", "total_bytes": total * MIB}
    for rank, total in enumerate((48, 160))
]
CONFIG = """\
name: sample
model: {factory: "revdist.models:revnet38", kwargs: {num_classes: 10}}
data: {factory: "revdist.training.datasets:digits"}
global_batch: 64
steps: 240
"""


def plan(rank: int, step: int, time: float, generation: int, reason: str, share: int, kept: int) -> dict[str, Any]:
    strip = "I" * (OPERATORS - kept) + "S" * kept
    modes = ["INVERT" if letter == "I" else "SAVE" for letter in strip]
    return {
        "time": time,
        "step": step,
        "rank": rank,
        "device": f"CPU-{rank:04d}",
        "generation": generation,
        "reason": reason,
        "share": share,
        "micro_batch": 16,
        "accumulation_steps": -(-share // 16),
        "budget_bytes": (12 + 3 * kept) * MIB,
        "free_bytes": 20 * MIB,
        "predicted_step_s": 0.1,
        "predicted_peak_bytes": (14 + 3 * kept) * MIB,
        "strip": strip,
        "schedule": {"modes": modes, "extra_s": 0.001 * (OPERATORS - kept), "need_bytes": (11 + 3 * kept) * MIB},
    }


def write_run(run_dir: Path, *, steps: int = 240, finished: bool = True) -> Path:
    """Write a whole run; `finished=False`: as a run that was cut off in the middle of a line."""
    rng = random.Random(7)
    run_dir.mkdir(parents=True)
    plans = [plan(0, 0, START, 0, "start", 20, 2), plan(1, 0, START, 0, "start", 44, OPERATORS)]
    squeeze, relax = steps // 3, 2 * steps // 3
    plans.append(plan(1, squeeze, START + 0.1 * squeeze, 1, "memory-lost", 40, 3))
    plans.append(plan(0, squeeze + 5, START + 0.1 * squeeze + 0.5, 1, "share", 24, 2))
    plans.append(plan(1, relax, START + 0.1 * relax, 2, "memory-gained", 44, OPERATORS))
    now = {0: plans[0], 1: plans[1]}
    metrics = []
    for step in range(1, steps + 1):
        time = START + 0.1 * step
        for later in plans[2:]:
            if later["step"] == step:
                now[later["rank"]] = later
        ranks = [_rank(now[rank], rng, squeezed=rank == 1 and squeeze <= step < relax) for rank in (0, 1)]
        metrics.append(
            {
                "time": time,
                "step": step,
                "epoch": step // 28,
                "samples": 64 * step,
                "loss": 2.3 * math.exp(-step / 60) + 0.05 * rng.random(),
                "lr": 0.1,
                "step_s": 0.1,
                "samples_per_s": 640 * rng.uniform(0.9, 1.1) * (0.8 if squeeze <= step < relax else 1.0),
                "ranks": ranks,
            }
        )
    events = [
        event(0, "start", detail="2 replicas", num_steps=steps, devices=DEVICES),
        event(squeeze, "co-tenant", device="CPU-0001", detail="takes 90.0 MiB"),
        event(squeeze, "replan", rank=1, detail="memory-lost"),
        event(relax, "co-tenant", device="CPU-0001", detail="gives it back"),
        event(steps, "end", detail="<script>alert(1)</script>"),
    ]
    (run_dir / "config.yaml").write_text(CONFIG)
    _write(run_dir / "plans.jsonl", plans)
    _write(run_dir / "metrics.jsonl", metrics, cut=not finished)
    _write(run_dir / "events.jsonl", events if finished else events[:-1])
    if finished:
        (run_dir / "summary.json").write_text(json.dumps(summary(plans, steps)))
    return run_dir


def event(step: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": START + 0.1 * step, "step": step, "kind": kind, **fields}


def summary(plans: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    return {
        "test_accuracy": 0.9833,
        "test_loss": 0.071,
        "steps": steps,
        "samples": 64 * steps,
        "wall_s": 0.1 * steps,
        "samples_per_s": 640.0,
        "final_plans": [plans[3], plans[4]],
        "gains": {"over_all_invert": 1.18, "over_equal_split": 1.31, "basis": "predicted from the measured profiles"},
    }


def _rank(plan: dict[str, Any], rng: random.Random, *, squeezed: bool) -> dict[str, Any]:
    total = 48 if plan["rank"] == 0 else 160
    return {
        "rank": plan["rank"],
        "device": plan["device"],
        "share": plan["share"],
        "samples": plan["share"],
        "micro_batch": plan["micro_batch"],
        "step_s": 0.1,
        "compute_s": 0.09,
        "peak_bytes": plan["predicted_peak_bytes"] - rng.randrange(MIB // 4),
        "predicted_peak_bytes": plan["predicted_peak_bytes"],
        "predicted_step_s": 0.1,
        "budget_bytes": plan["budget_bytes"],
        "free_bytes": (total - (130 if squeezed else 30)) * MIB if total > 48 else 24 * MIB,
        "generation": plan["generation"],
        "strip": plan["strip"],
        "demoted_bytes": 0,
    }


def _write(path: Path, lines: list[dict[str, Any]], *, cut: bool = False) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text[:-40] if cut else text)

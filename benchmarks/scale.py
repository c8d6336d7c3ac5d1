"""What a supervisor does in a round, with 10,000 simulated replicas: none of them is a process.

    python benchmarks/scale.py [--replicas N] [--types N]

The code is that of a run: the policy that each replica applies to its readings, the keeper of shares,
the orders of a group and the inboxes they arrive in. What carries messages to so many processes, Ray,
is not part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page import page
from benchmarks.provenance import RESULTS, provenance
from benchmarks.table import Table
from revdist.cluster.actor import Location
from revdist.cluster.groups import Groups
from revdist.cluster.shares import ShareKeeper
from revdist.config import RunConfig
from revdist.devices.reading import Reading
from revdist.planning.batch import StepTimeCurve, step_time_curve
from revdist.planning.costs import Mode, Option, Profile
from revdist.planning.policy import Rules, Standing, budget_of, decide
from revdist.planning.split import equal_split, slowest_s, split
from revdist.training.orders import Inbox, Shares
from revdist.training.reports import CurveReport
from revdist.training.row import Row

MIB = 2**20
OPERATORS = 24
PER_REPLICA = 32
"""Samples of the global batch per replica."""
REPEATS = 18
STEPS = 16 * 16 + 2
"""Enough for the keeper of shares to look at sixteen windows at once: the worst of them does."""
NOISY_STEPS = 7
"""That are different."""
SHARED, DISTINCT = "split, curves shared by type", "split, every replica's curve another one"
PLANNED = "a curve per type from its profile, and the split"
READINGS, TIMES = "readings: budget and decision of every replica", "times of a step taken in, by the keeper of shares"
PUBLISHED, REGROUPED = "publication: new shares into every inbox", "another group: an order for every replica"
ROUND = "a round: readings, times, publication"
GOALS_S = {SHARED: 0.005, PLANNED: 0.1, ROUND: 1.0}


class Simulation:
    """A run of many replicas, as its supervisor sees it."""

    def __init__(self, num_replicas: int, num_types: int) -> None:
        rng = random.Random(0)
        self.batch = PER_REPLICA * num_replicas
        self.kinds = [rng.randrange(num_types) for _ in range(num_replicas)]
        self.profiles = [_profile(1e-4 * (1 + number / 4)) for number in range(num_types)]
        self.budgets = [(8 + 4 * number) * MIB for number in range(num_types)]
        self.curves = self.plan()
        self.readings = [rng.randrange(self.budgets[kind] // 2, self.budgets[kind] * 2) for kind in self.kinds]
        self.own = [self.curves[kind] for kind in self.kinds]
        self.others = [curve.scaled(1 + rng.random()) for curve in self.own]
        self.inboxes = [Inbox() for _ in range(num_replicas)]
        tracemalloc.start()
        self.locations = [_location(number) for number in range(num_replicas)]
        self.groups = Groups("run")
        self.groups.meet(range(num_replicas), self.locations)
        self.keeper = self._started(num_replicas)
        self.held_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        self.rows = itertools.cycle([self._rows(rng) for _ in range(NOISY_STEPS)])
        tracemalloc.start()
        for _ in range(STEPS):
            self.take_times()
        self.held_bytes += tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()

    def _rows(self, rng: random.Random) -> list[Row]:
        """A step in which every replica is a little off its curve."""
        return [
            Row(
                share=share, compute_s=curve.step_s(share) * rng.uniform(0.97, 1.03), generation=self._shares.generation
            )
            for share, curve in zip(self._shares.by_rank, self.own, strict=True)
        ]

    @property
    def _shares(self) -> Shares:
        assert self.keeper.shares is not None
        return self.keeper.shares

    def plan(self) -> list[StepTimeCurve]:
        """A curve per type of device."""
        return [
            step_time_curve([profile], budget, max_share=64 * PER_REPLICA, micro_batches=(PER_REPLICA,))
            for profile, budget in zip(self.profiles, self.budgets, strict=True)
        ]

    def plan_and_split(self) -> None:
        curves = self.plan()
        split([curves[kind] for kind in self.kinds], self.batch)

    def read(self) -> None:
        """What each replica's policy makes of its reading; in a run they do this for themselves, all at once."""
        rules = Rules()
        for kind, free in zip(self.kinds, self.readings, strict=True):
            budget = budget_of(free, 0, 0, margin_bytes=MIB, fragmentation=0.02)
            decide(Standing(budget_bytes=self.budgets[kind], need_bytes=4 * MIB, minimum_bytes=MIB), budget, 0.0, rules)

    def take_times(self) -> None:
        shares = self.keeper.take_rows(next(self.rows))
        assert shares is None, "noise changed shares: what follows would be taken in at once"

    def publish(self) -> None:
        shares = Shares(generation=self._shares.generation, by_rank=self._shares.by_rank, reason="share")
        for inbox in self.inboxes:
            inbox.adopt(shares)

    def regroup(self) -> None:
        members = self.groups.members[:-1]
        shares = self.keeper.regroup(members, reason="lost")
        self.groups.order(members, [self.locations[member] for member in members], shares, orderly=False)

    def round(self) -> None:
        self.read()
        self.take_times()
        self.publish()

    def over_equal_split(self) -> float:
        """Slowest step under an equal split over that under the best shares."""
        equal = equal_split(self.batch, len(self.own))
        return slowest_s(self.own, equal) / slowest_s(self.own, split(self.own, self.batch))

    def _started(self, num_replicas: int) -> ShareKeeper:
        keeper = ShareKeeper(_config(self.batch), range(num_replicas))
        for reason in ("start", "profile"):
            for number, curve in enumerate(self.own):
                inverted = None if reason == "start" else curve
                keeper.take_curve(
                    number, CurveReport(rank=number, curve=curve, inverted=inverted, reason=reason, num_steps=1)
                )
        return keeper


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=10_000)
    parser.add_argument("--types", type=int, default=12, help="kinds of device: speed and memory")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    run = Simulation(options.replicas, options.types)
    seconds = measure(run)
    about = {**provenance(["numpy", "numba"]), "command": "python benchmarks/scale.py"}
    title = f"A supervisor's round with {options.replicas:,} simulated replicas of {options.types} types"
    remark = (
        f"Everything that the supervisor keeps of its replicas takes {run.held_bytes / MIB:.1f} MiB. "
        f"The best shares make the slowest step {run.over_equal_split():.2f} times shorter than equal ones.\n"
    )
    rows = [
        (name, f"{times['median'] * 1e3:.1f} ms", f"{times['worst'] * 1e3:.1f} ms", _goal(name, times))
        for name, times in seconds.items()
    ]
    table = Table(title=title, columns=("what", "median", "worst", "goal"), rows=rows)
    console = Console()
    console.print(table.for_terminal())
    console.print(remark)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"about": about, "seconds": seconds, "held_bytes": run.held_bytes, "over_equal": run.over_equal_split()}
    name = f"scale-{about['date'][:10]}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text(page(title, about, [table], remarks=[remark]), encoding="utf-8")


def measure(run: Simulation) -> dict[str, dict[str, float]]:
    """Median and worst seconds of each part."""
    return {
        SHARED: _timed(lambda: split(run.own, run.batch)),
        DISTINCT: _timed(lambda: split(run.others, run.batch)),
        PLANNED: _timed(run.plan_and_split),
        READINGS: _timed(run.read),
        TIMES: _timed(run.take_times, STEPS),
        PUBLISHED: _timed(run.publish),
        ROUND: _timed(run.round, STEPS),
        REGROUPED: _timed(run.regroup),
    }


def _timed(work: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    work()
    times = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return {"median": statistics.median(times), "worst": max(times)}


def _goal(name: str, times: dict[str, float]) -> str:
    if name not in GOALS_S:
        return ""
    return f"{GOALS_S[name] * 1e3:.0f} ms: {'met' if times['median'] <= GOALS_S[name] else 'missed'}"


def _profile(block_s: float) -> Profile:
    """A chain of blocks that can be kept or inverted."""
    held = 2**16 * PER_REPLICA
    options = [Option(Mode.SAVE, held, held // 2, 0.0), Option(Mode.INVERT, 0, held, block_s * PER_REPLICA / 3)]
    profile = Profile.from_options([options] * OPERATORS)
    return dataclasses.replace(profile, micro_batch=PER_REPLICA, base_s=block_s * PER_REPLICA * OPERATORS)


def _location(number: int) -> Location:
    host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    reading = Reading(
        uuid=f"GPU-{number}", name="GPU", kind="cuda", index=0, host=host,
        total_bytes=0, free_bytes=0, used_bytes=0, time_s=0.0,
    )  # fmt: skip
    return Location(host=host, address=host, pid=number, store_port=1, reading=reading)


def _config(batch: int) -> RunConfig:
    return RunConfig.from_mapping(
        {"model": {"factory": "a:b"}, "data": {"factory": "a:b"}, "global_batch": batch, "steps": 1}
    )


if __name__ == "__main__":
    main()

"""Compare revdist's planner with every other way to choose what to keep: time, quality, honesty.

    python benchmarks/planner.py           writes one table, one figure and the raw numbers
    python benchmarks/planner.py --help

Chains of 10 to 1000 operators in three families of sizes. Every plan is judged by simulating it, so
a plan over its budget is counted as such whatever its planner believes. Then the plans are carried
out on RevNet-38 and RevNet-164, and their step time and peak measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.planners import executed_result
from benchmarks.planners.executed import NETWORKS, PART_SHARE, execute
from benchmarks.planners.figure import draw
from benchmarks.planners.result import Result
from benchmarks.planners.study import study
from benchmarks.provenance import RESULTS, provenance

FILE_WIDTH = 150
"""Columns of the tables where the output is no terminal."""
LENGTHS = [10, 104, 300, 1000]
COMMAND = "python benchmarks/planner.py"
DISTRIBUTIONS = ["revdist", "torch", "numba", "numpy", "scipy"]
METHOD = (
    "Times are process CPU time, medians; the first plan includes what a planner prepares before it knows a "
    "budget, each further budget is what a new memory reading costs. Budgets lie evenly between the smallest plan "
    "and the fastest. Planners that take long are asked for 5 of 25 budgets from 100 operators on, rotor's DP up "
    "to 300 operators; HiGHS may take 10 s a budget. Knapsack planners choose SAVE or INVERT with the largest "
    "transient reserved, as in the paper; rotor and checkpointing know no inverse. Extra time is the sum over all "
    "plans that fit, over that of the optima; all SAVE, all INVERT and checkpointing every sqrt(n) do not depend "
    "on the budget, so that over budget means that they do not fit."
)


EXECUTED_COMMAND = "python benchmarks/planner.py --parts executed"
EXECUTED_METHOD = (
    "Every planner plans with one measured profile of the network for five budgets between revdist's smallest plan "
    "and its fastest, and its plans are carried out: modes on the chain, checkpoint plans on torch.utils.checkpoint. "
    "All variants step once a round, in an order drawn anew, in a process that keeps freed memory. Times are process "
    "CPU time, medians; ratios are medians of ratios within a round. Peaks are those of the CPU device's ledger over "
    "parameters and gradients, the batch included. "
    "Knapsack planners choose SAVE or INVERT, or RECOMPUTE where an operator has no inverse."
)
COMPILED_METHOD = (
    "torch.compile gets the whole network, for five of its fractions. Beside it, revdist plans a network whose "
    f"branches and layers were compiled one by one, with the fraction {PART_SHARE} and channels last, which "
    "torch.compile chooses for the whole; it is held to the fastest fraction that fits each budget. All other rows are "
    "in eager mode. "
)
ROUNDS = 9
PARTS = ("solved", "executed")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if "solved" in options.parts:
        _solve(options, console)
    if "executed" in options.parts:
        _execute(options, console)


def _solve(options: argparse.Namespace, console: Console) -> None:
    """How long planners take, and what their plans cost by simulation."""
    with console.status("") as status:
        scores = tuple(study(options.lengths, status.update))
    result = Result(about=provenance(DISTRIBUTIONS) | {"command": COMMAND, "method": METHOD}, scores=scores)
    for table in result.tables():
        console.print(table.for_terminal())
    name = f"planner-{result.about['date'][:10]}"
    paths = result.write(options.out, name, figure=f"{name}.png")
    draw(scores, options.out / f"{name}.png")
    console.print("written: " + ", ".join(str(path) for path in [*paths, options.out / f"{name}.png"]))


def _execute(options: argparse.Namespace, console: Console) -> None:
    """What their plans cost when they are carried out."""
    with console.status("") as status:
        executions = execute(options.networks, options.rounds, status.update, compiled=options.compile)
    for table in executed_result.tables(executions):
        console.print(table.for_terminal())
    about = provenance(DISTRIBUTIONS) | executed_about(options.networks, options.rounds, compiled=options.compile)
    name = "planner-executed-compiled" if options.compile else "planner-executed"
    paths = executed_result.write(executions, about, options.out, f"{name}-{about['date'][:10]}")
    console.print("written: " + ", ".join(str(path) for path in paths))


def executed_about(networks: Sequence[str], rounds: int, *, compiled: bool = False) -> dict[str, str]:
    """How plans were carried out."""
    batches = ", ".join(f"{NETWORKS[name][1]} images for {name}" for name in networks)
    return {
        "command": f"{EXECUTED_COMMAND} --networks {' '.join(networks)} --rounds {rounds}{' --compile' * compiled}",
        "method": f"{EXECUTED_METHOD} {COMPILED_METHOD * compiled}Rounds: {rounds}; batches: {batches}.",
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="operators (default: 10 104 300 1000)")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"steps of each plan carried out (default: {ROUNDS})"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile's memory budgets beside the plans carried out: minutes"
    )
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="on which plans are carried out"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

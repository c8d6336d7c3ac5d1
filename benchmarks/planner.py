"""Compare revdist's planner with every other way to choose what to keep: time, quality, honesty.

    python benchmarks/planner.py           writes one table, one figure and the raw numbers
    python benchmarks/planner.py --help

Chains of 10 to 1000 operators in three families of sizes. Every plan is judged by simulating it, so
a plan over its budget is counted as such whatever its planner believes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.planners.figure import draw
from benchmarks.planners.result import Result
from benchmarks.planners.study import study
from benchmarks.provenance import RESULTS, provenance

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


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(1)
    console = Console()
    with console.status("") as status:
        scores = tuple(study(options.lengths, status.update))
    result = Result(about=provenance(DISTRIBUTIONS) | {"command": COMMAND, "method": METHOD}, scores=scores)
    for table in result.tables():
        console.print(table.for_terminal())
    name = f"planner-{result.about['date'][:10]}"
    paths = result.write(options.out, name, figure=f"{name}.png")
    draw(scores, options.out / f"{name}.png")
    console.print("written: " + ", ".join(str(path) for path in [*paths, options.out / f"{name}.png"]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="operators (default: 10 104 300 1000)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Train on two unequal devices: plain DDP, proportional shares and revdist, against each device alone.

python benchmarks/heterogeneous.py            writes tables, a figure and the raw numbers
python benchmarks/heterogeneous.py --quick    one short round
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.provenance import RESULTS, provenance
from benchmarks.unequal.cases import CASES, GLOBAL_BATCH, Case
from benchmarks.unequal.figure import draw
from benchmarks.unequal.result import Result, Round
from benchmarks.unequal.ways import Bench
from revdist.planning.split import equal_split

COMMAND = "python benchmarks/heterogeneous.py"
METHOD = (
    "A RevNet for digits on two CPU devices, each replica on a core of its own with one thread, 64 samples a step. "
    "Per round every way trains once in every case, one after the other; throughput is by the median step after a "
    "third of the run, with changing memory by all steps after it; ratios are taken within a round and tables show "
    "medians over rounds. Plain DDP is written by hand: autograd as usual, equal shares, one "
    "micro-batch size that fits both devices at their worst. Proportional: the same with shares by what each device "
    "does alone, and for each rank the largest micro-batch that fits. Alone: revdist on one device, the other idle. "
    "Apart: two hand-written trainings at once that exchange nothing, over the sum of each with the machine to itself: "
    "what the cores lose by sharing caches and execution units, whoever trains on them."
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    console = Console(width=170)
    cases = [case for case in CASES if not options.cases or case.key in options.cases]
    steps, rounds = (45, 1) if options.quick else (options.steps, options.rounds)
    with console.status("") as status, tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder=Path(folder), steps=steps)
        found = [
            each for number in range(rounds) for each in _round(bench, cases, f"round {number + 1}: ", status.update)
        ]
    about = provenance(["ray", "revdist", "torch"]) | {"command": COMMAND, "method": METHOD}
    result = Result(about=about, rounds=tuple(found))
    for table in result.tables():
        console.print(table.for_terminal())
    name = f"heterogeneous-{about['date'][:10]}"
    paths = result.write(options.out, name, figure=f"{name}.png")
    draw(result, options.out / f"{name}.png")
    console.print("written: " + ", ".join(str(path) for path in [*paths, options.out / f"{name}.png"]))


def _round(bench: Bench, cases: Sequence[Case], label: str, say: Callable[[str], None]) -> Iterator[Round]:
    for case in cases:
        say(f"{label}{case.title}")
        first, second = bench.alone(case, 0), bench.alone(case, 1)
        part = first.samples_per_s / (first.samples_per_s + second.samples_per_s)
        share = min(max(round(part * GLOBAL_BATCH), 1), GLOBAL_BATCH - 1)
        yield Round(
            case=case,
            alone=(first, second),
            apart=bench.apart(case),
            plain=bench.plain(case, equal_split(GLOBAL_BATCH, 2), same_micro_batch=True),
            proportional=bench.plain(case, (share, GLOBAL_BATCH - share), same_micro_batch=False),
            revdist=bench.revdist(case),
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short runs, for trying it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--cases", nargs="+", choices=[case.key for case in CASES], metavar="CASE")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""Train on two unequal devices: plain DDP, proportional shares and revdist, against each device alone.

python benchmarks/heterogeneous.py            writes tables, a figure and the raw numbers
python benchmarks/heterogeneous.py --quick    a few short rounds
python benchmarks/heterogeneous.py --batch 256  steps four times as long
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from benchmarks.provenance import RESULTS, command_line, provenance
from benchmarks.unequal.cases import CASES, GLOBAL_BATCH, Case
from benchmarks.unequal.figure import draw
from benchmarks.unequal.job import Job
from benchmarks.unequal.result import Finding, Result, Round
from benchmarks.unequal.ways import Bench, neighbour
from revdist.planning.split import equal_split

J = TypeVar("J", bound=Job)
COMMAND = "python benchmarks/heterogeneous.py"
WARM_STEPS = 400
"""Of revdist on both devices: it looks at its shares every 16 steps, at up to 256 of them together, and anew
after every change."""
_WARM_STEPS_ALONE = 40
"""Of revdist on one device, which has no shares to find."""
_WARM_STEPS_BY_HAND = 10
METHOD = (
    "A RevNet for digits on two CPU devices, each replica on a core of its own with one thread, {batch} samples a "
    "step, SGD in one fused loop. All ways of a case are started; revdist takes {warm} steps, {alone} on one "
    "device, those by hand {by_hand}; from then on they have the machine in turns, the others stopped with all "
    "their processes, so that what is compared ran within seconds. A turn's throughput is that of the steps that "
    "began and ended in it; ratios are taken within a round, tables show medians over rounds, and means where "
    "memory changes. The host of a virtual machine slows each core down by up to a half, from one step to the next, "
    "and two devices together wait for the slower one: hence also ratios of the upper quartiles over rounds. Plain "
    "DDP is written by hand: autograd as usual, equal shares, one micro-batch size that fits both devices at their "
    "worst. Proportional: the same with shares by what each device does alone, and for each rank the largest "
    "micro-batch that fits. Alone: revdist on one device with half the batch, the other idle. Apart: two hand-written "
    "trainings at once that exchange nothing, over the sum of each with the machine to itself: what the cores lose "
    "by sharing caches and memory, whoever trains on them. Where revdist's time goes is told by its own metrics of "
    "the same turns: waiting that is due to the shares, and waiting because a core is faster in one step than in "
    "the next, which no fixed shares avoid."
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, as Ctrl-C does
    console = Console(width=170)
    cases = [case for case in CASES if not options.cases or case.key in options.cases]
    rounds, turn_s = (3, 2.0) if options.quick else (options.rounds, options.turn)
    found = []
    with console.status("") as status, tempfile.TemporaryDirectory() as folder:
        for case in cases:
            finding = _measure(Bench(Path(folder), options.batch), case, rounds, turn_s, status.update)
            console.print(f"{case.title}: {finding.typical(lambda each: each.of_sum('revdist')):.2f} of the sum alone")
            found.append(finding)
    about = provenance(["ray", "revdist", "torch"]) | {
        "command": command_line(COMMAND, arguments),
        "method": METHOD.format(
            batch=options.batch, warm=WARM_STEPS, alone=_WARM_STEPS_ALONE, by_hand=_WARM_STEPS_BY_HAND
        ),
    }
    result = Result(about=about | {"turn_s": turn_s}, findings=tuple(found))
    for table in result.tables():
        console.print(table.for_terminal())
    what = [] if options.batch == GLOBAL_BATCH else [str(options.batch)]
    name = "-".join(["heterogeneous", *what, *(options.cases or []), about["date"][:10]])
    paths = result.write(options.out, name, figure=f"{name}.png")
    draw(result, options.out / f"{name}.png")
    console.print("written: " + ", ".join(str(path) for path in [*paths, options.out / f"{name}.png"]))


def _measure(bench: Bench, case: Case, rounds: int, turn_s: float, say: Callable[[str], None]) -> Finding:
    with ExitStack() as jobs:
        jobs.enter_context(neighbour(case))

        def start(job: J, steps: int = _WARM_STEPS_BY_HAND) -> J:
            jobs.enter_context(job).warm_up(steps)
            return job

        say(f"{case.title}: starting")
        alone = [start(bench.alone(case, rank), _WARM_STEPS_ALONE) for rank in (0, 1)]
        speeds = [statistics.median(job.turn(turn_s).samples_per_s for _ in range(3)) for job in alone]
        share = min(max(round(speeds[0] / sum(speeds) * bench.global_batch), 1), bench.global_batch - 1)
        shares = (share, bench.global_batch - share)
        by_hand_alone = [start(bench.apart(case, (rank,))) for rank in (0, 1)]
        apart = start(bench.apart(case))
        plain = start(bench.plain(case, equal_split(bench.global_batch, 2), same_micro_batch=True))
        proportional = start(bench.plain(case, shares, same_micro_batch=False))
        revdist = start(bench.revdist(case), WARM_STEPS)
        with_memory = [alone[1], revdist]
        found = []
        for number in range(rounds):
            say(f"{case.title}: round {number + 1} of {rounds}")
            changes = [partial(job.change_memory, number, rounds) for job in with_memory]
            found.append(
                Round(
                    alone=(alone[0].turn(turn_s), alone[1].turn(turn_s, meanwhile=changes[0])),
                    by_hand_alone=(by_hand_alone[0].turn(turn_s), by_hand_alone[1].turn(turn_s)),
                    apart=apart.turn(turn_s),
                    plain=plain.turn(turn_s),
                    revdist=revdist.turn(turn_s, meanwhile=changes[1]),
                    proportional=proportional.turn(turn_s),
                )
            )
        return Finding(
            case=case,
            proportional_shares=shares,
            revdist_shares=revdist.shares(),
            losses=revdist.losses([each.revdist for each in found]),
            rounds=tuple(found),
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few short rounds, for trying it out")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turn", type=float, default=2.5, metavar="SECONDS", help="that each way has the machine for")
    parser.add_argument("--batch", type=int, default=GLOBAL_BATCH, metavar="SAMPLES", help="of a step on both devices")
    parser.add_argument("--cases", nargs="+", choices=[case.key for case in CASES], metavar="CASE")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

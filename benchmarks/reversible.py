"""Compare revdist with other ways to train a reversible network: behaviour, step time and peak memory.

    make bench                             installs the other libraries into .venv-bench and runs this
    python benchmarks/reversible.py --help

The network: additive couplings with two branches of BN-ReLU-Conv3x3 twice, 2 x 32 channels, 32 x 32
pixels, batch 8, float32, one thread. Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.heap import keep_freed_memory
from benchmarks.peers import behaviour, extras, probes_distributed, probes_gradients, probes_state
from benchmarks.peers.bodies import PEERS, PLAIN, REVDIST, Subject
from benchmarks.peers.cost import CHANNELS, Case, Cost, measure
from benchmarks.peers.figure import draw
from benchmarks.peers.isolation import call_isolated
from benchmarks.peers.networks import convolution_branch, couplings
from benchmarks.peers.planned import planned_cases
from benchmarks.peers.result import Result
from benchmarks.provenance import RESULTS, provenance
from revdist.devices import MemoryMeter, open_device
from revdist.reversible import ReversibleChain

PROBES = (*probes_gradients.PROBES, *probes_state.PROBES, *probes_distributed.PROBES)
PROBE_TIMEOUT_S = 60.0
ROUNDS = {4: 25, 12: 31, 50: 9}
"""Steps of each way per depth; a deeper network steps longer."""

DEPTH_OF_EXTRAS = 12
PARTS = ["behaviour", "buckets", "cost"]

FILE_WIDTH = 150
"""Columns of the tables where the output is no terminal."""

COMMAND = "make bench"
METHOD = (
    "Every way steps once in each round, in an order drawn anew; times are medians of process CPU time, peaks those "
    "of the CPU allocator above what it held before the step (parameters not included). The process keeps memory that "
    "is freed, so that no step faults pages in that another gave back. Gradient errors are relative L2 "
    "differences from plain autograd; where a ReLU's input changes sign by rounding they reach 1e-4 in any library."
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    warnings.filterwarnings("ignore")  # of the libraries compared, which predate this PyTorch
    torch.set_num_threads(1)
    keep_freed_memory()
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    subjects = list(_installed((PLAIN, *PEERS, *REVDIST), console))
    rounds = {depth: _rounds(options, depth) for depth in options.depths}
    about = provenance(subject.distribution for subject in subjects)
    result = Result(
        about=about | {"command": COMMAND, "method": METHOD, "rounds": rounds},
        labels={subject.key: _full_name(subject) for subject in subjects},
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        if "behaviour" in options.parts:  # first, for it forks and autograd's threads do not survive that
            judge_all(subjects, result, progress)
        if "buckets" in options.parts:
            time_buckets(subjects, result, progress)
        if "cost" in options.parts:
            measure_costs(subjects, result, progress, options)
    for table in result.tables():
        console.print(table.for_terminal())
    _write(result, options.out, console)


def judge_all(subjects: Sequence[Subject], result: Result, progress: Progress) -> None:
    """Fill the behaviour table."""
    _import_all(subjects)
    task = progress.add_task("behaviour", total=len(PROBES) * len(subjects))
    for probe in PROBES:
        result.questions[probe.key] = probe.question
        result.verdicts[probe.key] = {}
        for subject in subjects:
            verdict = behaviour.judge(probe, subject, timeout_s=PROBE_TIMEOUT_S)
            result.verdicts[probe.key][subject.key] = verdict
            progress.advance(task)


def time_buckets(subjects: Sequence[Subject], result: Result, progress: Progress) -> None:
    """Fill the table of DDP's buckets."""
    for subject in progress.track(subjects, description="DDP buckets"):
        ending = call_isolated(
            lambda subject=subject: extras.measure_buckets(subject, DEPTH_OF_EXTRAS), timeout_s=PROBE_TIMEOUT_S
        )
        if ending.trouble:
            progress.console.print(f"DDP buckets, {subject.label}: {ending.trouble}")
        else:
            result.buckets[subject.key] = ending.value


def measure_costs(subjects: Sequence[Subject], result: Result, progress: Progress, options: argparse.Namespace) -> None:
    """Fill the tables of time and memory, and of demotion."""
    with tempfile.TemporaryDirectory() as folder:  # a ledger that nobody else sees
        device = open_device(name="benchmark", capacity_bytes=options.capacity_gib * 2**30, directory=folder)
        device.activate()
        meter = device.meter()
        if not meter.exact:
            progress.console.print("[yellow]no compiler, so no exact memory meter: peaks are estimates[/]")
        for depth in options.depths:
            result.costs += _costs_at(depth, subjects, meter, progress, _rounds(options, depth))
        result.demotions = extras.measure_demotion(DEPTH_OF_EXTRAS, meter)


def _costs_at(
    depth: int, subjects: Sequence[Subject], meter: MemoryMeter, progress: Progress, rounds: int
) -> list[Cost]:
    network = couplings(lambda: convolution_branch(CHANNELS), depth)
    cases = []
    for subject in subjects:
        if subject not in REVDIST:
            own = copy.deepcopy(network)
            cases.append(Case(key=subject.key, label=_full_name(subject), model=subject.build(own), network=own))
    chain = REVDIST[0].build(network)
    assert isinstance(chain, ReversibleChain)
    for subject in REVDIST:
        modes = subject.build(copy.deepcopy(network)).schedule
        cases.append(Case(key=subject.key, label=subject.label, model=chain, network=network, schedule=modes))
    task = progress.add_task(f"profile, depth {depth}")
    cases += planned_cases(
        chain, network, meter, progress=lambda done, total: progress.update(task, completed=done, total=total)
    )
    task = progress.add_task(f"steps, depth {depth}", total=(rounds + 1) * len(cases))
    return measure(depth, cases, meter, rounds=rounds, done=lambda: progress.advance(task))


def _installed(subjects: Sequence[Subject], console: Console) -> Iterator[Subject]:
    for subject in subjects:
        if subject.installed:
            yield subject
        else:
            console.print(f"[yellow]{subject.distribution} is not installed and left out: `make bench` installs it[/]")


def _import_all(subjects: Sequence[Subject]) -> None:
    """Import what probes use, once, so that a forked process need not."""
    importlib.import_module("torch._dynamo")
    for subject in subjects:
        subject.build(couplings(lambda: convolution_branch(2), 1))


def _full_name(subject: Subject) -> str:
    """With its version, where that is not the one of torch or of revdist."""
    return subject.label if subject.distribution in ("torch", "revdist") else f"{subject.label} {subject.version}"


def _rounds(options: argparse.Namespace, depth: int) -> int:
    return options.rounds or ROUNDS.get(depth, 9)


def _write(result: Result, folder: Path, console: Console) -> None:
    name = f"reversible-{result.about['date'][:10]}"
    figure = folder / f"{name}.png" if result.costs else None
    paths = result.write(folder, name, figure=figure.name if figure else "")
    if figure:
        draw(result.costs, figure)
        paths.append(figure)
    console.print("written: " + ", ".join(str(path) for path in paths))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--depths", nargs="+", type=int, default=list(ROUNDS), help="couplings (default: 4 12 50)")
    parser.add_argument("--rounds", type=int, default=0, help="steps of each way per depth (default: by depth)")
    parser.add_argument("--capacity-gib", type=int, default=8, help="of the CPU device that counts memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""What a fault costs: torchrun, Ray Train v2, torchft and revdist, doing the same training.

make bench-faults                        installs the others into .venv-bench-faults and runs this
python benchmarks/faults.py --help
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.provenance import RESULTS, command_line, provenance
from benchmarks.recovery import subjects
from benchmarks.recovery.fault import FAULTS, Fault
from benchmarks.recovery.result import Finding, Result, cell
from benchmarks.recovery.subjects import SUBJECTS, Subject, environment
from benchmarks.recovery.watching import Step, end, pause, wait_for
from revdist.training.run_directory import RunReader

COMMAND = "make bench-faults"
WARM_STEPS = 65
"""Steps before the fault."""
STEPS_AFTER = 40
"""Steps by which it is clear that training goes on."""
START_S = 180.0
LIMIT_S = 45.0
MEMORY_LEFT = 0.75
"""Part of what a plan needs that is left for the next one."""
METHOD = (
    "Two workers on one machine, three where two are killed, train a small RevNet, 16 images a step, each launched its "
    "own way. A fault is done from outside after 65 steps, half-way between checkpoints. The pause is the longest time "
    "around it without a completed step, less a usual step; steps lost are those taken a second time (torchrun and Ray "
    "Train go back to a checkpoint, saved here every 10 steps). torchft and revdist give a silent worker up after "
    f"{subjects.HEARTBEAT_S:.0f} s, torchft's collectives time out after 5 s; the others are as they come. "
    "Ranges are over rounds."
)


class NotStarted(Exception):
    """A training did not come to the point at which something was to be done to it."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, as Ctrl-C does
    console = Console(width=170)
    chosen = [subject for subject in SUBJECTS if not options.only or subject.key in options.only]
    faults = [fault for fault in FAULTS if not options.faults or fault.key in options.faults]
    findings = []
    with console.status("") as status:
        for number in range(options.rounds):
            for fault in faults:
                for subject in chosen:
                    status.update(f"round {number + 1}: {fault.name}, {subject.label}")
                    finding = examine(subject, fault, limit_s=options.limit)
                    findings.append(finding)
                    console.print(f"{fault.name}, {subject.label}: {cell([finding])}", highlight=False)
    versions = [name for subject in chosen for name in subject.packages if _missing(subject) is None]
    result = Result(
        about=provenance({"revdist", "torch", *versions}) | {"command": _command(arguments), "method": METHOD},
        subjects=tuple(subject.label for subject in chosen),
        faults=tuple(fault.name for fault in faults),
        findings=tuple(findings),
    )
    for table in result.tables():
        console.print(table.for_terminal())
    paths = result.write(options.out, f"faults-{result.about['date'][:10]}")
    console.print("written: " + ", ".join(map(str, paths)))


def examine(subject: Subject, fault: Fault, *, limit_s: float) -> Finding:
    """Start a training, do one fault to it, and see what it costs."""
    missing = _missing(subject)
    if missing is not None:
        return Finding(subject=subject.label, fault=fault.name, pause=None, note=f"{missing} is not installed")
    if fault.signal is None and not subject.replans:
        return Finding(subject=subject.label, fault=fault.name, pause=None, note="only by a restart")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            return _examine(subject, fault, folder, limit_s)
        except NotStarted as error:
            print(error, file=sys.stderr)
            return Finding(subject=subject.label, fault=fault.name, pause=None, note="did not start")
        finally:
            end(name)


def _examine(subject: Subject, fault: Fault, folder: Path, limit_s: float) -> Finding:
    began_s = time.time()
    subject.launch(folder, environment(folder), fault.num_workers)
    if not wait_for(lambda: _reached(subject.steps(folder), WARM_STEPS), patience_s=START_S):
        raise NotStarted(f"{subject.label} took no {WARM_STEPS} steps in {START_S:.0f} s:\n{_outputs(folder)}")
    first_step_s = subject.steps(folder)[0].time - began_s
    fault_s = _take_memory(fault, folder) if fault.signal is None else _signal(subject, fault, folder)
    goes_on = wait_for(lambda: _goes_on(subject.steps(folder), fault_s), patience_s=limit_s)
    return Finding(
        subject=subject.label,
        fault=fault.name,
        pause=pause(subject.steps(folder), fault_s) if goes_on else None,
        limit_s=limit_s,
        first_step_s=first_step_s,
    )


def _signal(subject: Subject, fault: Fault, folder: Path) -> float:
    assert fault.signal is not None
    pids = [pid for rank in fault.ranks if (pid := subject.pid(folder, rank)) is not None]
    if len(pids) < len(fault.ranks):
        raise NotStarted(f"{subject.label} has no process of some rank of {fault.ranks}:\n{_outputs(folder)}")
    fault_s = time.time()
    for pid in pids:
        os.kill(pid, fault.signal)
    return fault_s


def _take_memory(fault: Fault, folder: Path) -> float:
    """Let another process take so much of a rank's memory that its plan no longer fits; returns when one does again."""
    (rank,) = fault.ranks
    plan = [plan for plan in RunReader(folder / "run").plans() if plan["rank"] == rank][-1]
    take = plan["budget_bytes"] - int(MEMORY_LEFT * plan["schedule"]["need_bytes"])
    subjects.start_co_tenant(f"cpu-{rank}", take, folder)
    adopted: list[float] = []

    def is_adopted() -> bool:
        plans = RunReader(folder / "run").plans()
        adopted[:] = [float(plan["time"]) for plan in plans if plan["reason"] == "memory-lost"]
        return bool(adopted)

    if not wait_for(is_adopted, patience_s=START_S):
        raise NotStarted(f"no plan followed the memory:\n{_outputs(folder)}")
    return adopted[0] - 0.05  # the step before it counts as before


def _reached(steps: Sequence[Step], number: int) -> bool:
    return bool(steps) and steps[-1].number >= number


def _goes_on(steps: Sequence[Step], fault_s: float) -> bool:
    """Whether enough steps follow the fault for it not to be the last one's end."""
    return len({step.number for step in steps if step.time > fault_s}) >= STEPS_AFTER


def _missing(subject: Subject) -> str | None:
    for name in subject.packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return name
    return None


def _outputs(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in sorted(folder.glob("output-*.log")))


def _command(arguments: Sequence[str] | None) -> str:
    """What was run: all of it, or a part."""
    by_itself = "python benchmarks/faults.py"
    given = command_line(by_itself, arguments)
    return COMMAND if given == by_itself else given


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds to wait for steps to go on")
    parser.add_argument("--only", nargs="+", choices=[subject.key for subject in SUBJECTS], metavar="LAUNCHER")
    parser.add_argument("--faults", nargs="+", choices=[fault.key for fault in FAULTS], metavar="FAULT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

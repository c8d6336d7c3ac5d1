"""The command `revdist`.

Each command imports what it needs when it runs, so that `revdist --help` answers at once. Errors
leave here as five lines at most, on stderr, with the exit code that says whose turn it is:
0 done, 1 the run failed, 2 wrong usage or configuration, 130 interrupted, 143 preempted after saving.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console

from revdist import __version__
from revdist.cluster.way_out import leave
from revdist.errors import RevdistError, UsageError

if TYPE_CHECKING:
    from revdist.config import RunConfig
    from revdist.devices.reading import Reading

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    help="Train reversible networks on unequal devices, each with the fastest schedule its own free memory allows.",
    epilog="Start with: revdist launch configs/digits-revnet-2cpu.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(markup=False, emoji=False)  # errors, paths and processes may have anything between brackets
errors = Console(stderr=True, markup=False, emoji=False)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run; configs/ has some.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Values that go before the file's: global_batch=64 devices.0.capacity=1GiB"
    ),
]
Address = Annotated[
    str | None, typer.Option(metavar="auto|HOST:PORT", help="A running Ray cluster; none: one of its own.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What `revdist launch` wrote.")]
LocalRanks = Annotated[
    str | None,
    typer.Option(
        "--local-ranks-filter",
        "--local_ranks_filter",
        metavar="0,2",
        help="As torchrun has it: show what these ranks print, counted on each host.",
    ),
]
ShowTraceback = Annotated[
    bool, typer.Option(help="Show where in the code an error came from.", envvar="REVDIST_TRACEBACK")
]


def reported(command: Callable[P, T]) -> Callable[P, T]:
    """Turn what a command raises into lines for a person and an exit code for a script."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            errors.print(
                f"interrupted: {interrupt}" if str(interrupt) else "interrupted", style="yellow", soft_wrap=True
            )
            raise typer.Exit(130) from None
        except RevdistError as error:
            _show_failure(error)
            raise typer.Exit(error.exit_code) from error
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except Exception as error:
            _show_failure(error)
            raise typer.Exit(1) from error

    return run


def _show_failure(error: Exception) -> None:
    from revdist.reporting.failure import failure_text

    if _traceback_wanted():
        errors.print_exception()
    errors.print(failure_text(error), soft_wrap=True)


def _traceback_wanted() -> bool:
    return os.environ.get("REVDIST_TRACEBACK", "") not in ("", "0")


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"revdist {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def revdist(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    traceback: ShowTraceback = False,
) -> None:
    if traceback:
        os.environ["REVDIST_TRACEBACK"] = "1"


@app.command()
@reported
def launch(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; none: runs/<name>-<time> in this folder.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --run-dir.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show configuration, devices and plan; train nothing.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the run is under way; it goes on in the background.")
    ] = False,
    nnodes: Annotated[
        str | None, typer.Option("--nnodes", metavar="N|MIN:MAX", help="As torchrun has it: sets workers.min and .max.")
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option("--nproc-per-node", "--nproc_per_node", metavar="N", min=1, help="As torchrun has it.")
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option("--max-restarts", "--max_restarts", metavar="N", min=0, help="Sets workers.max_restarts."),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option("--log-dir", "--log_dir", metavar="DIR", help="Where ranks' logs go; none: RUN_DIR/logs."),
    ] = None,
    local_ranks_filter: LocalRanks = None,
) -> None:
    """Train: one replica per device, replanned live when a device's free memory changes."""
    if resume and run_dir is None:
        raise UsageError("--resume needs --run-dir; name the run directory that holds the checkpoint")
    log_ranks = _numbers(local_ranks_filter)
    flags = _workers(nnodes, nproc_per_node)
    flags += [] if max_restarts is None else [f"workers.max_restarts={max_restarts}"]
    settings = _read_config(config, [*flags, *(overrides or [])])
    from revdist.cluster.trainer import Trainer

    trainer = Trainer(settings, address=address, run_dir=run_dir, resume=resume, log_dir=log_dir)
    if dry_run:
        from revdist.reporting.dry_run import show_dry_run

        show_dry_run(console, settings, trainer.dry_run())
    elif detach:
        from revdist.reporting.detaching import launch_detached

        arguments = ["launch", str(config), *flags, *(overrides or []), *([f"--address={address}"] if address else [])]
        raise typer.Exit(launch_detached(console, errors, trainer, arguments))
    else:
        from revdist.reporting.live import LiveView

        with LiveView(console, name=settings.name, log_ranks=log_ranks) as view:
            trainer.observer = view
            trainer.fit()


def _numbers(text: str | None) -> frozenset[int]:
    """`0,2` as numbers. Raises UsageError for anything else."""
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--local-ranks-filter {text} must be numbers with commas between them, such as 0,2")
    return frozenset(int(part) for part in parts)


def _workers(nnodes: str | None, nproc_per_node: int | None) -> list[str]:
    """torchrun's `--nnodes` and `--nproc-per-node` as overrides: their product is the number of replicas."""
    if nnodes is None and nproc_per_node is None:
        return []
    low, separator, high = (nnodes or "1").partition(":")
    if not low.isdecimal() or int(low) < 1 or (separator and (not high.isdecimal() or int(high) < int(low))):
        raise UsageError(f"--nnodes {nnodes} must be a number, or MIN:MAX with MIN not above MAX")
    each = nproc_per_node or 1
    return [f"workers.min={int(low) * each}", f"workers.max={int(high or low) * each}"]


def _read_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a configuration; factories in the current folder can be named in it, as with `python -m`."""
    from revdist.config import RunConfig

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return RunConfig.from_yaml(path, overrides)


@app.command()
@reported
def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a run; not needed with --device-profile.")
    ] = None,
    overrides: Overrides = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="SIZE", help="A budget to look at, 6GiB; more than once for more."),
    ] = None,
    device_profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan for the device whose profile this is; nothing is measured."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the profile, for --device-profile elsewhere.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run one step and draw its memory over the predicted one.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.png|.html", help="Draw the plan into this file.")] = None,
) -> None:
    """Show the best schedule for every budget, and what more memory would buy; train nothing."""
    from revdist.reporting.plan_report import PlanRequest, report_plan

    request = PlanRequest(
        config=None if config is None else _read_config(config, overrides or []),
        budgets=tuple(budget or ()),
        device_profile=device_profile,
        export=export,
        measure=measure,
        out=out,
    )
    report_plan(console, request)


@app.command()
@reported
def devices(
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show them again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Pause between readings.")] = 1.0,
) -> None:
    """Show every device, its free memory and who holds the rest."""
    from revdist.reporting.tables import devices_table, watch_devices

    with _device_source(address) as read:
        if watch:
            watch_devices(console, read, every_s=every)
        else:
            console.print(devices_table(read()))


def _device_source(address: str | None) -> AbstractContextManager[Callable[[], list[Reading]]]:
    """What reads the devices: of this machine, or of a whole cluster."""
    if address is None:
        from revdist.devices import list_devices

        return nullcontext(list_devices)
    from revdist.cluster.inventory import cluster_devices

    return cluster_devices(address)


@app.command()
@reported
def doctor(address: Address = None) -> None:
    """Say what this machine, and a cluster at --address, lack for training, with the remedy."""
    from revdist.reporting.doctor import examine, findings_table

    findings = examine(address)
    console.print(findings_table(findings))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


@app.command()
@reported
def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="For a program to read.")] = False,
) -> None:
    """Show what a run is up to. Exit code: 0 while it lives, then its own; 1 where it was killed."""
    from revdist.reporting.status import read_status, status_mapping, status_view

    found = read_status(run_dir)
    if as_json:
        console.print_json(data=status_mapping(found))
    else:
        console.print(status_view(found))
    raise typer.Exit(found.exit_code)


@app.command()
@reported
def attach(run_dir: RunDir, local_ranks_filter: LocalRanks = None) -> None:
    """Watch a run that another process drives; Ctrl-C leaves it alone. Exit code as for status."""
    from revdist.reporting.attaching import attach as watch
    from revdist.reporting.status import status_view

    log_ranks = _numbers(local_ranks_filter)
    found = watch(console, run_dir, log_ranks=log_ranks)
    if not found.alive:
        console.print(status_view(found))
    raise typer.Exit(found.exit_code)


@app.command()
@reported
def logs(
    run_dir: RunDir,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", metavar="N", min=0, help="Only this rank's; more than once for more.")
    ] = None,
    local_ranks_filter: LocalRanks = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
) -> None:
    """Show what the processes of the ranks print."""
    from revdist.reporting.rank_logs import show_logs

    show_logs(console, run_dir, ranks=rank or (), local_ranks=_numbers(local_ranks_filter), follow=follow)


@app.command()
@reported
def stop(
    run_dir: RunDir,
    now: Annotated[bool, typer.Option("--now", help="Kill it; nothing is saved.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Time to save in, after which it is killed.")
    ] = 150.0,
) -> None:
    """Let a run save and leave, and make sure that nothing of it is left running."""
    from revdist.reporting.stopping import stop_and_tell

    stop_and_tell(console, run_dir, now=now, timeout_s=timeout)


@app.command()
@reported
def report(
    run_dir: RunDir,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="Write the figures there too, as PNG files.")
    ] = None,
) -> None:
    """Write RUN_DIR/report.html: figures, plans, events and configuration in one file."""
    from revdist.reporting.html import write_report
    from revdist.reporting.run_figures import write_figures

    for path in [write_report(run_dir), *(write_figures(run_dir, png) if png else [])]:
        console.print(path, soft_wrap=True, highlight=False)


def main() -> None:
    try:
        app(prog_name="revdist")
    except SystemExit as ended:
        leave(ended)


if __name__ == "__main__":
    main()

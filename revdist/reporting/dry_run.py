"""What a run would be, before it is: its configuration, its devices and the plan each would get."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from revdist.config import RunConfig
from revdist.devices.reading import Reading
from revdist.errors import format_bytes
from revdist.planning.costs import Plan, Profile
from revdist.planning.policy import budget_of
from revdist.planning.split import equal_split, split
from revdist.reporting.phrases import letters_used, seconds
from revdist.reporting.strips import Strip, legend
from revdist.reporting.tables import devices_table
from revdist.training.local_planner import LocalPlanner


def plans_for(
    config: RunConfig, readings: Sequence[Reading], profiles: Sequence[Profile], *, fixed_bytes: int
) -> tuple[Plan, ...]:
    """The plan each device would start with, if all of them were as fast as the one profiled.

    Raises BudgetTooSmall where a device is too small for any plan, BatchTooSmall for a batch that
    gives some device no sample.
    """
    planners = [
        LocalPlanner(
            config,
            profiles,
            device=reading.name,
            fixed_bytes=fixed_bytes,
            step_peak_bytes=max(profile.step_peak_bytes for profile in profiles),
        )
        for reading in readings
    ]
    curves = [
        planner.start(_budget(config, reading, fixed_bytes))
        for planner, reading in zip(planners, readings, strict=True)
    ]
    if config.planning.share == "equal":
        shares = equal_split(config.global_batch, len(readings))
    else:
        shares = split(curves, config.global_batch)
    return tuple(
        planner.plan(share, rank=rank, generation=0, reason="start")
        for rank, (planner, share) in enumerate(zip(planners, shares, strict=True))
    )


def _budget(config: RunConfig, reading: Reading, fixed_bytes: int) -> int:
    return budget_of(
        reading.free_bytes,
        0,
        0,
        margin_bytes=config.memory.margin,
        fragmentation=config.memory.fragmentation,
        pending_bytes=fixed_bytes,
        limit_bytes=config.memory.budget,
    )


def dry_run_view(config: RunConfig, readings: Sequence[Reading], plans: Sequence[Plan]) -> RenderableType:
    """The whole answer of `revdist launch --dry-run`."""
    strips = [plan.schedule.strip for plan in plans]
    return Group(
        Text("Configuration", style="bold"),
        Syntax(config.to_yaml().rstrip(), "yaml", background_color="default", word_wrap=True),
        Text("\nDevices", style="bold"),
        devices_table(readings),
        Text("\nPlan", style="bold"),
        _plans_table(readings, plans),
        legend(letters_used(strips)),
        Text(
            "as fast as this machine was measured to be; each device measures itself when the run starts", style="dim"
        ),
    )


def _plans_table(readings: Sequence[Reading], plans: Sequence[Plan]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True)
    table.add_column("device", style="bold", no_wrap=True)
    for name in ("budget", "needs", "share", "micro-batch", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("schedule", ratio=1, no_wrap=True)
    for reading, plan in zip(readings, plans, strict=True):
        table.add_row(
            reading.name,
            format_bytes(plan.budget_bytes),
            format_bytes(plan.schedule.need_bytes),
            str(plan.share),
            f"{plan.micro_batch} x {plan.accumulation_steps}",
            seconds(plan.predicted_step_s),
            Strip(plan.schedule.strip),
        )
    return table


def show_dry_run(console: Console, config: RunConfig, readings: Sequence[Reading]) -> None:
    """Profile on this machine, or take the cached profile, and print what the run would be."""
    from revdist.reporting.measuring import open_bench

    with open_bench(config) as bench:
        profiles = bench.profiles(console, num_replicas=len(readings))
        plans = plans_for(config, readings, profiles, fixed_bytes=bench.fixed_bytes())
    console.print(dry_run_view(config, readings, plans))

"""`revdist plan`: from a configuration or a profile file to the picture of its plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from revdist.config import RunConfig
from revdist.errors import ConfigError, UsageError, format_bytes
from revdist.planning.costs import Mode, Profile
from revdist.planning.policy import budget_of
from revdist.reporting.plan_study import Study, study
from revdist.reporting.plan_view import study_view
from revdist.reporting.profile_files import read_profiles, write_profiles
from revdist.sizes import parse_bytes
from revdist.training.local_planner import accurate

SUFFIXES = (".png", ".html")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What `revdist plan` was asked. Raises UsageError for what cannot be answered."""

    config: RunConfig | None = None
    budgets: tuple[str, ...] = ()
    """Sizes as they were written, `6GiB`."""
    device_profile: Path | None = None
    export: Path | None = None
    measure: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.config is None and self.device_profile is None:
            raise UsageError("nothing to plan for; give a CONFIG, or a profile with --device-profile")
        if self.measure and (self.config is None or self.device_profile is not None):
            raise UsageError("--measure runs the model on this machine; give its CONFIG and no --device-profile")
        if self.out is not None and self.out.suffix not in SUFFIXES:
            raise UsageError(f"--out {self.out} ends in {self.out.suffix or 'nothing'}; let it end in .png or .html")

    @property
    def title(self) -> str:
        if self.config is not None:
            return self.config.name
        assert self.device_profile is not None
        return self.device_profile.stem

    @property
    def budgets_bytes(self) -> tuple[int, ...]:
        try:
            return tuple(parse_bytes(budget) for budget in self.budgets)
        except ValueError as error:
            raise UsageError(f"--budget: {error}") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One step as it ran: what `Bench.timeline` returns."""

    held_bytes: Sequence[int]
    peak_bytes: int


def report_plan(console: Console, request: PlanRequest) -> None:
    """Answer on the console, and in the files asked for. Raises UsageError for what cannot be planned."""
    budgets = request.budgets_bytes
    found, measured, profiles = _find(console, request, budgets)
    console.print(study_view(found))
    if measured is not None:
        need = found.focus.schedule.need_bytes
        console.print(
            f"Measured peak at {format_bytes(found.focus.budget_bytes)}: {format_bytes(measured.peak_bytes)}, "
            f"predicted {format_bytes(need)} ({measured.peak_bytes / need - 1:+.1%})",
            highlight=False,
        )
    if request.export is not None:
        write_profiles(request.export, profiles)
        console.print(f"wrote {request.export}", highlight=False, soft_wrap=True)
    if request.out is not None:
        _draw(request.out, found, measured, title=request.title)
        console.print(f"wrote {request.out}", highlight=False, soft_wrap=True)


def _find(
    console: Console, request: PlanRequest, budgets: Sequence[int]
) -> tuple[Study, Measured | None, Sequence[Profile]]:
    if request.device_profile is not None:
        profiles = read_profiles(request.device_profile)
        return _study(request.config, profiles, budgets), None, profiles
    assert request.config is not None
    from revdist.reporting.measuring import open_bench

    with open_bench(request.config) as bench:
        profiles = bench.profiles(console, num_replicas=_num_replicas(request.config))
        found = _study(request.config, profiles, budgets, fixed_bytes=bench.fixed_bytes())
        if not request.measure:
            return found, None, profiles
        held, peak = bench.timeline(found.focus.schedule.modes, found.profile.micro_batch)
        return found, Measured(held, peak), profiles


def _study(
    config: RunConfig | None, profiles: Sequence[Profile], budgets: Sequence[int], *, fixed_bytes: int | None = None
) -> Study:
    if config is None:
        return study(profiles, budgets)
    if fixed_bytes is None:
        fixed_bytes = max(profile.fixed_bytes for profile in profiles)
    return study(
        accurate(profiles, config),
        budgets,
        devices=device_budgets(config, fixed_bytes),
        modes=[Mode(mode) for mode in config.planning.modes],
        guarantee=config.planning.guarantee,
    )


def device_budgets(config: RunConfig, fixed_bytes: int) -> dict[str, int]:
    """By name, what activations could use of each device whose capacity is configured, were it empty."""
    if config.devices == "auto":
        return {}
    return {
        spec.name or f"cpu-{index}": budget_of(
            spec.capacity,
            0,
            0,
            margin_bytes=config.memory.margin,
            fragmentation=config.memory.fragmentation,
            pending_bytes=fixed_bytes,
            limit_bytes=config.memory.budget,
        )
        for index, spec in enumerate(config.devices)
        if spec.capacity is not None
    }


def _num_replicas(config: RunConfig) -> int:
    return config.workers.min if config.devices == "auto" else len(config.devices)


def _draw(path: Path, found: Study, measured: Measured | None, *, title: str) -> None:
    from revdist.reporting.figure import save_png
    from revdist.reporting.html import plan_page
    from revdist.reporting.plan_figures import plan_figure

    held = measured.held_bytes if measured else ()
    try:
        if path.suffix == ".png":
            save_png(plan_figure(found, measured_bytes=held, title=title), path)
        else:
            page = plan_page(found, plan_figure(found, measured_bytes=held), title=title)
            path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place with --out") from None

"""Figures of a run: how it learnt, how fast, and how every device's memory and schedule moved together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import blended_transform_factory

from revdist.errors import ConfigError
from revdist.planning.costs import Mode
from revdist.reporting.figure import house_style, mode_handles, new_figure, save_png
from revdist.reporting.history import Line, RunHistory, read_history
from revdist.reporting.palette import INK, MODE_COLORS, MODE_OF_LETTER, MUTED, rank_color
from revdist.reporting.phrases import REASONS, byte_unit, letters_used, rate

T = TypeVar("T")

MAX_POINTS = 1500
"""Points drawn per line; longer runs are thinned, which a figure this wide cannot show."""
FREE = "#9aa5b1"
PAUSE = "#d64545"
CHANGE_COLORS = {"lost": "#b51d14", "joined": "#00805f"}
MAX_LABELS = 12
"""Changes of who takes part that are named; further ones are lines alone."""
LABEL_SHARE = 0.15
"""A plan in force for less than this part of the run has no room for a label."""
_LABEL_BOX: Any = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
MAX_RANKS = 8
"""Ranks with a panel of their own."""


def figures(history: RunHistory) -> dict[str, Figure]:
    """Every figure of a run, by file name; none before its first step."""
    if not history.metrics:
        return {}
    return {"learning": learning_figure(history), "memory": memory_figure(history)}


def write_figures(run_dir: Path, folder: Path) -> list[Path]:
    """Write the figures of a run into `folder`, which is made if need be, and return their paths.

    Raises UsageError where `run_dir` is not a run directory, ConfigError where the folder cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(read_history(run_dir)).items():
            written.append(folder / f"{name}.png")
            save_png(figure, written[-1])
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}; choose another place with --png") from None
    return written


def learning_figure(history: RunHistory) -> Figure:
    """Loss and throughput over time, with every change of plan marked, and who was lost or joined."""
    with house_style():
        figure, (loss, speed) = new_figure([2.2, 2.0], share_x=True)
        times, lines = _over_time(history)
        _curve(loss, times, _values(lines, "loss"), rank_color(0))
        loss.set_title("Loss")
        loss.set_ylabel("training loss")
        _curve(speed, times, _values(lines, "samples_per_s"), rank_color(2))
        speed.set_title("Throughput")
        speed.set_ylabel("samples/s")
        speed.yaxis.set_major_formatter(lambda value, _: rate(value) if value else "0")
        for axes in (loss, speed):
            _mark_replans(axes, history)
        _shade_pauses(speed, history)
        _mark_changes(speed, history)
        speed.set_xlabel("seconds since the start")
    return figure


def memory_figure(history: RunHistory) -> Figure:
    """Per rank: free memory, budget, measured and predicted peak of activations; below, the schedule as it changed."""
    ranks = history.ranks[:MAX_RANKS]
    with house_style():
        figure, panels = new_figure([height for _ in ranks for height in (1.9, 0.85)], share_x=True)
        for index, rank in enumerate(ranks):
            _memory(panels[2 * index], history, rank)
            _ribbon(panels[2 * index + 1], history, rank)
        panels[-1].set_xlabel("seconds since the start")
        panels[-1].set_xlim(0, max(history.end_s - history.start_s, 1e-9))
        strips = [str(plan.get("strip", "")) for plan in history.plans]
        handles = [*_memory_handles(), *mode_handles(letters_used(strips))]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _over_time(history: RunHistory) -> tuple[np.ndarray, Sequence[Line]]:
    lines = _thin(history.metrics)
    return np.array([line["time"] - history.start_s for line in lines]), lines


def _thin(lines: Sequence[T]) -> Sequence[T]:
    return lines[:: max(1, -(-len(lines) // MAX_POINTS))]


def _values(lines: Sequence[Line], key: str) -> np.ndarray:
    """One number per line; NaN, which leaves a gap, where a line has none."""
    return np.array([np.nan if line.get(key) is None else line[key] for line in lines], dtype=float)


def _curve(axes: Axes, times: np.ndarray, values: np.ndarray, color: str) -> None:
    """Every value faintly, their running median over it."""
    axes.plot(times, values, color=color, alpha=0.25, linewidth=1)
    axes.plot(times, _smoothed(values), color=color)
    axes.set_ylim(bottom=0)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running median over about a fiftieth of the run, which leaves steps steep; at both ends over as many."""
    width = min(2 * max(1, len(values) // 100) + 1, len(values))
    starts = np.clip(np.arange(len(values)) - width // 2, 0, len(values) - width)
    return np.array([np.median(values[start : start + width]) for start in starts])


def _memory(axes: Axes, history: RunHistory, rank: int) -> None:
    steps = _thin(history.steps_of(rank))
    times = np.array([line["time"] - history.start_s for line, _ in steps])
    parts = [part for _, part in steps]
    fixed = fixed_bytes(history.plans_of(rank), [line["step"] for line, _ in steps])
    free = _values(parts, "free_bytes")
    measured = _values(parts, "peak_bytes") - fixed
    plans = history.plans_of(rank)
    in_force = [*plans, *plans[-1:]]  # the last one until the end
    adopted = [plan["time"] - history.start_s for plan in plans] + [history.end_s - history.start_s for _ in plans[-1:]]
    budget = np.array([plan["budget_bytes"] for plan in in_force])
    need = np.array([plan["schedule"]["need_bytes"] for plan in in_force])
    unit, size = byte_unit([*free, *measured, *budget])
    color = rank_color(rank)
    axes.plot(times, free / size, ".", color=FREE, markersize=4, zorder=1)
    axes.step(adopted, budget / size, where="post", color=INK, linewidth=1.4)
    axes.step(adopted, need / size, where="post", color=color, linestyle=(0, (4, 2)), linewidth=1.3)
    _curve(axes, times, measured / size, color)
    _mark_replans(axes, history, rank)
    axes.set_ylim(0, 1.2 * max([1.0, *free, *measured, *budget]) / size)
    axes.set_ylabel(unit)
    axes.set_title(f"Rank {rank}, {_device_name(history, rank)}: memory for activations")


def _memory_handles() -> list[Artist]:
    """One legend for all panels; peaks are drawn in each rank's colour."""
    return [
        Line2D([], [], color=FREE, marker=".", linestyle="", label="free, as read during steps"),
        Line2D([], [], color=INK, linewidth=1.4, label="budget"),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 2)), linewidth=1.3, label="peak, predicted"),
        Line2D([], [], color=MUTED, label="peak, measured"),
    ]


def fixed_bytes(plans: Sequence[Line], steps: Sequence[int]) -> np.ndarray:
    """Per step, the part of a peak that no schedule changes: parameters, gradients, optimizer state.

    Peaks are of all that a replica holds, budgets of its activations alone; this is what lies between.
    """
    if not plans:
        return np.zeros(len(steps))
    adopted = [plan["step"] for plan in plans]
    fixed = np.array([plan["predicted_peak_bytes"] - plan["schedule"]["need_bytes"] for plan in plans], dtype=float)
    return fixed[np.clip(np.searchsorted(adopted, steps, side="right") - 1, 0, None)]


def _ribbon(axes: Axes, history: RunHistory, rank: int) -> None:
    """The schedule over time: operators from top to bottom, each in the colour of its mode."""
    plans = [plan for plan in history.plans_of(rank) if plan.get("strip")]
    axes.grid(visible=False)
    axes.set_ylabel("operators")
    axes.set_yticks([])
    if not plans:
        return
    modes = list(Mode)
    edges = [plan["time"] - history.start_s for plan in plans] + [history.end_s - history.start_s]
    height = max(len(plan["strip"]) for plan in plans)
    for start, end, plan in zip(edges[:-1], edges[1:], plans, strict=True):
        column = np.array([[modes.index(MODE_OF_LETTER[letter])] for letter in plan["strip"]])
        axes.pcolormesh(
            [start, max(end, start)],
            np.linspace(0, height, len(column) + 1),
            column,
            cmap=ListedColormap([MODE_COLORS[mode] for mode in modes]),
            vmin=-0.5,
            vmax=len(modes) - 0.5,
            edgecolors="white",
            linewidth=0.4 if height <= 60 else 0,
        )
        if end - start > LABEL_SHARE * edges[-1]:
            shares = f" {plan['share']} samples, {plan['accumulation_steps']} x {plan['micro_batch']}"
            axes.text(start, 0, shares, va="bottom", fontsize=7.5, color=INK)
    axes.set_ylim(height, 0)


def _mark_replans(axes: Axes, history: RunHistory, rank: int | None = None) -> None:
    """A line at every change of plan, of one rank with its reason, or of all of them without."""
    place = blended_transform_factory(axes.transData, axes.transAxes)
    for changed in history.ranks if rank is None else (rank,):
        for plan in history.plans_of(changed)[1:]:
            at = plan["time"] - history.start_s
            axes.axvline(at, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            if rank is not None:
                reason = REASONS.get(str(plan["reason"]), str(plan["reason"]))
                text = f" {reason} "
                axes.text(at, 0.96, text, transform=place, va="top", fontsize=7.5, color=MUTED, bbox=_LABEL_BOX)


def _shade_pauses(axes: Axes, history: RunHistory) -> None:
    """The time that steps lost to attempts that were redone, and to forming another group."""
    for line in history.metrics:
        pause_s = line.get("pause_s") or 0.0
        if pause_s > 0:
            at = line["time"] - history.start_s
            axes.axvspan(max(0.0, at - pause_s), at, color=PAUSE, alpha=0.3, linewidth=0)


def _mark_changes(axes: Axes, history: RunHistory) -> None:
    """A line, and what happened, wherever replicas were lost or joined."""
    place = blended_transform_factory(axes.transData, axes.transAxes)
    changes = [event for event in history.events if event.get("kind") in CHANGE_COLORS]
    for number, event in enumerate(changes):
        at, color = event["time"] - history.start_s, CHANGE_COLORS[str(event["kind"])]
        axes.axvline(at, color=color, linewidth=1.2)
        if number < MAX_LABELS:
            name = history.device_name(str(event.get("device", "")))
            height = 0.96 - 0.12 * (number % 4)  # neighbours one below the other
            text = f" {name} {event['kind']} "
            axes.text(at, height, text, transform=place, va="top", fontsize=7.5, color=color, bbox=_LABEL_BOX)


def _device_name(history: RunHistory, rank: int) -> str:
    device = history.device(rank)
    plans = history.plans_of(rank)
    return str(device.get("name") or (plans[0]["device"] if plans else "unknown device"))

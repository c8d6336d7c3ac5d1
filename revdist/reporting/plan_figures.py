"""Figures of a plan: the frontier, schedules over the network, a step's memory, throughput by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from revdist.errors import format_bytes
from revdist.planning.costs import Mode, Profile
from revdist.planning.replay import replay
from revdist.reporting.figure import house_style, mode_handles, new_figure, operators_axis
from revdist.reporting.palette import FAINT, INK, MODE_COLORS, MUTED, RANK_COLORS
from revdist.reporting.phrases import byte_unit, letters_used, rate, time_unit
from revdist.reporting.plan_study import Choice, Study, letter

ACCENT = RANK_COLORS[0]


def plan_figure(found: Study, *, measured_bytes: Sequence[int] = (), title: str = "") -> Figure:
    """Everything `revdist plan` knows, on one page.

    `measured_bytes`: 2n allocator readings of a real step under the schedule shown, as `timeline` takes them.
    """
    strips_height = 0.75 + 0.34 * len(found.choices)
    heights = [3.0, strips_height, 2.5] + ([2.5] if found.curves else [])
    with house_style():
        figure, panels = new_figure(heights)
        frontier(panels[0], found)
        strips(panels[1], found.choices, names=found.profile.operator_names)
        timeline(panels[2], found.profile, found.focus, measured_bytes=measured_bytes)
        if found.curves:
            batches(panels[3], found)
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def frontier(axes: Axes, found: Study) -> None:
    """Extra time against budget, with the chosen budgets marked and the two extremes named."""
    budgets = np.asarray(found.frontier.budgets_bytes, dtype=float)
    extra = np.asarray(found.frontier.extra_s, dtype=float)
    unit, size = byte_unit(budgets)
    time_name, scale = time_unit(extra)
    span = max(budgets[-1] - budgets[0], 1.0)
    most = max(budgets[-1], found.all_save.need_bytes, found.all_invert.need_bytes)
    left, right = max(0.0, budgets[0] - 0.1 * span), most + 0.12 * span
    x = np.append(budgets, right) / size
    y = np.append(extra, extra[-1]) / scale
    axes.fill_between(x, y, step="post", color=ACCENT, alpha=0.10, linewidth=0)
    axes.step(x, y, where="post", color=ACCENT)
    axes.axvspan(left / size, budgets[0] / size, color=FAINT, linewidth=0)
    axes.text(left / size, 0.5, " nothing fits", rotation=90, va="center", color=MUTED, fontsize=8.5,
              transform=axes.get_xaxis_transform())  # fmt: skip
    _extremes(axes, found, size, scale)
    for index, choice in enumerate(found.choices):
        beyond = choice.budget_bytes > right  # marked at the edge: an axis that long would hide the frontier
        point = (min(choice.budget_bytes, right - 0.02 * span) / size, choice.schedule.extra_s / scale)
        axes.plot(
            *point,
            ">" if beyond else "o",
            color=ACCENT,
            markersize=12,
            markeredgecolor="white",
            zorder=5,
            clip_on=False,
        )
        axes.annotate(letter(index), point, ha="center", va="center_baseline", color="white", fontsize=8.5,
                      fontweight="bold", zorder=6, annotation_clip=False)  # fmt: skip
    axes.set_xlim(left / size, right / size)
    highest = max(float(extra[0]), found.all_invert.extra_s) / scale
    axes.set_ylim(0, max(highest * 1.14, 1e-9))
    axes.set_title("Frontier: the least extra time at every budget")
    axes.set_xlabel(f"activation budget ({unit})")
    axes.set_ylabel(f"extra time ({time_name})")
    if found.profile.base_s > 0:
        _percent_axis(axes, scale / found.profile.base_s)


def _percent_axis(axes: Axes, share_per_unit: float) -> None:
    """The same extra time on the right, as a share of the fastest step."""

    def to_share(value: Any) -> Any:
        return value * share_per_unit

    def to_time(share: Any) -> Any:
        return share / share_per_unit

    percent = axes.secondary_yaxis("right", functions=(to_share, to_time))
    percent.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"+{100 * value:.3g}%"))
    percent.spines["right"].set_visible(False)


def _extremes(axes: Axes, found: Study, size: float, scale: float) -> None:
    """The two schedules that need no planner, for comparison."""
    for schedule, name in ((found.all_invert, "all INVERT"), (found.all_save, "all SAVE")):
        point = (schedule.need_bytes / size, schedule.extra_s / scale)
        axes.plot(*point, "D", color=INK, markersize=5, zorder=4, clip_on=False)
        axes.annotate(name, point, (9, 4), textcoords="offset points", fontsize=8.5, annotation_clip=False)


def strips(axes: Axes, choices: Sequence[Choice], *, names: Sequence[str] = ()) -> None:
    """One row per chosen budget: the mode of every operator, in chain order."""
    modes = list(Mode)
    grid = np.array([[modes.index(mode) for mode in choice.schedule.modes] for choice in choices])
    num_operators = grid.shape[1]
    axes.pcolormesh(
        np.arange(num_operators + 1) - 0.5,
        np.arange(len(choices) + 1) - 0.5,
        grid,
        cmap=ListedColormap([MODE_COLORS[mode] for mode in modes]),
        vmin=-0.5,
        vmax=len(modes) - 0.5,
        edgecolors="white",
        linewidth=1.2 if num_operators <= 120 else 0,
    )
    labels = [
        f"{choice.device}  {letter(index)}   {format_bytes(choice.budget_bytes)}".strip()
        for index, choice in enumerate(choices)
    ]
    axes.set_yticks(range(len(choices)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    operators_axis(axes, num_operators, names=names)
    axes.set_title("Schedules over the network")
    if not names or num_operators > 24:
        axes.set_xlabel("operator, input to output")
    used = letters_used([choice.schedule.strip for choice in choices])
    axes.legend(handles=mode_handles(used), loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)


def timeline(
    axes: Axes,
    profile: Profile,
    choice: Choice,
    *,
    measured_bytes: Sequence[int] = (),
) -> None:
    """Memory through one step: forward then backward, what is held and what each operator works with on top.

    `measured_bytes`: allocator readings at the start of each of the 2n moments, `fixed_bytes` taken off.
    """
    budget_bytes, schedule = choice.budget_bytes, choice.schedule
    moments = replay(profile, schedule.modes).timeline
    unit, size = byte_unit([*(moment.peak_bytes for moment in moments), budget_bytes])
    edges = np.arange(len(moments) + 1)
    held = np.array([moment.held_bytes for moment in moments]) / size
    peak = np.array([moment.peak_bytes for moment in moments]) / size
    axes.stairs(peak, edges, fill=True, color=ACCENT, alpha=0.28, label="working")
    axes.stairs(held, edges, fill=True, color=ACCENT, alpha=0.75, label="held")
    if len(measured_bytes) == len(moments):
        measured = np.asarray(measured_bytes) / size
        axes.stairs(measured, edges, baseline=None, color=INK, linewidth=1.3, label="measured")
    axes.axhline(budget_bytes / size, color=RANK_COLORS[1], linestyle=(0, (5, 3)), linewidth=1.4, label="budget")
    middle = len(moments) / 2
    axes.axvline(middle, color=MUTED, linewidth=0.8)
    _mode_ribbon(axes, [schedule.modes[moment.operator] for moment in moments])
    axes.set_xlim(0, len(moments))
    axes.set_ylim(0, max(float(peak.max()), budget_bytes / size) * 1.1 or 1.0)
    axes.set_xticks([middle / 2, middle * 1.5], ["forward: operators in order", "backward: in reverse"])
    axes.tick_params(axis="x", length=0, pad=9)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(f"activations ({unit})")
    axes.set_title(f"One step within {format_bytes(budget_bytes)}")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)


def _mode_ribbon(axes: Axes, modes: Sequence[Mode]) -> None:
    """A thin band under the axis that shows each moment's mode."""
    for index, mode in enumerate(modes):
        axes.axvspan(index, index + 1, ymin=-0.045, ymax=-0.01, color=MODE_COLORS[mode], clip_on=False, linewidth=0)


def batches(axes: Axes, found: Study) -> None:
    """Throughput against micro-batch, a line per budget, its best marked."""
    for index, (budget, points) in enumerate(found.curves):
        if not points:
            continue
        sizes = [point.micro_batch for point in points]
        rates = [point.samples_per_s for point in points]
        color = RANK_COLORS[index % len(RANK_COLORS)]
        axes.plot(sizes, rates, color=color, label=format_bytes(budget))
        best = max(points, key=lambda point: point.samples_per_s)
        axes.plot(best.micro_batch, best.samples_per_s, "o", color=color, markeredgecolor="white", markersize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value) if value else "0"))
    axes.set_ylim(0, 1.1 * max((point.samples_per_s for _, points in found.curves for point in points), default=1.0))
    axes.set_title("Throughput by micro-batch (dot: the best)")
    axes.set_xlabel("micro-batch (samples)")
    axes.set_ylabel("samples/s")
    axes.legend(title="budget", loc="lower left", title_fontsize=8.5)

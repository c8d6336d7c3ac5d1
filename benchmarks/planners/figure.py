"""The picture of the comparison: how long a plan takes to find, and what plans cost at each budget."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.planners.result import GOAL_FAMILY, GOAL_LENGTH
from benchmarks.planners.study import Score
from revdist.reporting.figure import house_style

MIB = 2**20
STYLES = {
    "revdist": ("#0072b2", "o"),
    "revdist, one budget": ("#56b4e9", "o"),
    "paper's knapsack": ("#d55e00", "s"),
    "torch dp": ("#009e73", "^"),
    "torch ilp": ("#cc79a7", "v"),
    "torch greedy": ("#b8a100", "<"),
    "HiGHS MILP": ("#000000", "x"),
    "rotor's DP": ("#e69f00", "D"),
    "all INVERT": ("#888888", "_"),
}


def draw(scores: Sequence[Score], path: Path) -> None:
    """Write the figure: solve time by chain length on the left, extra time by budget on the right."""
    with house_style():
        figure = Figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_times(left, scores)
        _draw_quality(right, scores)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path, dpi=160)


def _draw_times(axes: Axes, scores: Sequence[Score]) -> None:
    for name, (color, marker) in STYLES.items():
        mine = [score for score in scores if score.planner == name]
        lengths = list(dict.fromkeys(score.num_operators for score in mine))
        first = [statistics.median(s.first_s for s in mine if s.num_operators == length) for length in lengths]
        axes.plot(lengths, first, marker + "-", color=color, label=name)
        if name == "revdist":
            again = [statistics.median(s.solve_s for s in mine if s.num_operators == length) for length in lengths]
            axes.plot(lengths, again, marker + ":", color=color, label="revdist, each further budget")
    axes.set(xscale="log", yscale="log", xlabel="operators", ylabel="CPU seconds to the first plan")
    axes.set_title("Time to plan, median of three families")


def _draw_quality(axes: Axes, scores: Sequence[Score]) -> None:
    for score in scores:
        chain = score.family, score.num_operators
        if chain != (GOAL_FAMILY, GOAL_LENGTH) or score.planner not in STYLES or score.planner == "revdist, one budget":
            continue
        color, marker = STYLES[score.planner]
        fits = [trial for trial in score.trials if trial.valid]
        axes.plot(
            [trial.budget_bytes / MIB for trial in fits],
            [100 * trial.extra_s / score.base_s for trial in fits],
            marker + "-",
            color=color,
            markersize=4,
            zorder=3 if score.planner == "revdist" else 2,
        )
    axes.set(xlabel="budget, MiB", ylabel="extra step time, %")
    axes.set_title(f"Plans that fit, {GOAL_FAMILY}, {GOAL_LENGTH} operators")

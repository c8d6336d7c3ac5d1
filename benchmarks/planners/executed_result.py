"""What carrying the plans out found: tables, goals, and a figure of time over memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.page import page
from benchmarks.planners.executed import COMPILED, Execution, Revdist, RevdistCompiled, RevdistOffload
from benchmarks.planners.result import Goal, goal_table
from benchmarks.table import Table
from revdist.reporting.figure import house_style

MIB = 2**20
CLOSE = 1.03
"""How far from the best of all peers a step may be."""
OURS = (Revdist.name, RevdistOffload.name, RevdistCompiled.name)
MARKERS = "osD^v<>xP*"


def tables(executions: Sequence[Execution]) -> Iterator[Table]:
    """Per network, every planner's step at every budget; then the goals."""
    for network in dict.fromkeys(execution.network for execution in executions):
        mine = [execution for execution in executions if execution.network == network]
        budgets = sorted({execution.budget_bytes for execution in mine})
        rows = []
        for planner in dict.fromkeys(execution.planner for execution in mine):
            cells = {e.budget_bytes: _cell(e) for e in mine if e.planner == planner}
            rows.append([planner, *(cells.get(budget, "no plan") for budget in budgets)])
        yield Table(
            title=f"{network}, carried out: step time over revdist's (ms, peak in MiB)",
            columns=["planner", *(f"{budget / MIB:.1f} MiB" for budget in budgets)],
            rows=rows,
        )
    yield goal_table(list(goals(executions)))


def goals(executions: Sequence[Execution]) -> Iterator[Goal]:
    """What was set out for plans that are carried out."""
    over = [e for e in executions if e.planner in OURS and not e.fits]
    total = sum(e.planner in OURS for e in executions)
    yield Goal(name="plans over budget, carried out", wanted="0", measured=f"{len(over)} of {total}", met=not over)
    for network in dict.fromkeys(execution.network for execution in executions):
        mine = [e for e in executions if e.network == network]
        peers = [e for e in mine if e.planner not in OURS and e.fits and not _is_compiled(e)]
        for what, chosen, wanted, limit in (
            ("checkpointing", [e for e in peers if e.checkpoints], "at most 1", 1.0),
            ("the best of all peers", peers, f"at most {CLOSE}", CLOSE),
        ):
            worst = max((1 / e.ratio for e in chosen), default=0.0)
            yield Goal(
                name=f"step time over that of {what}, worst budget, {network}",
                wanted=wanted,
                measured=f"{worst:.3f}",
                met=worst <= limit,
            )
        ratios = list(_compiled_ratios(mine))
        if ratios:
            yield Goal(
                name=f"compiled parts' step time over that of torch.compile's best, worst budget, {network}",
                wanted=f"at most {CLOSE}",
                measured=f"{max(ratios):.3f}",
                met=max(ratios) <= CLOSE,
            )


def _compiled_ratios(executions: Sequence[Execution]) -> Iterator[float]:
    """Per budget that a fraction of torch.compile's fits in: revdist's step with compiled parts over its best."""
    for own in executions:
        if own.planner == RevdistCompiled.name:
            same = [e for e in executions if _is_compiled(e) and e.budget_bytes == own.budget_bytes and e.fits]
            if same:
                yield own.ratio / min(e.ratio for e in same)


def _is_compiled(execution: Execution) -> bool:
    return execution.planner.startswith(COMPILED)


def write(executions: Sequence[Execution], about: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write `name`.json, `name`.md and `name`.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("json", "md", "png")]
    content = {
        "about": about,
        "goals": [dataclasses.asdict(goal) for goal in goals(executions)],
        "executions": [dataclasses.asdict(execution) for execution in executions],
    }
    paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = page("Plans carried out", about, tables(executions), figure=paths[2].name, caption="step time over peak")
    paths[1].write_text(text, encoding="utf-8")
    draw(executions, paths[2])
    return paths


def draw(executions: Sequence[Execution], path: Path) -> None:
    """Write the figure: measured step time against measured peak, a panel a network."""
    networks = list(dict.fromkeys(execution.network for execution in executions))
    with house_style():
        figure = Figure(figsize=(6 * len(networks), 5), layout="constrained")
        panels = figure.subplots(1, len(networks), squeeze=False)[0]
        for axes, network in zip(panels, networks, strict=True):
            mine = [execution for execution in executions if execution.network == network]
            for number, planner in enumerate(dict.fromkeys(execution.planner for execution in mine)):
                points = sorted({(e.peak_bytes / MIB, 1000 * e.step_s) for e in mine if e.planner == planner})
                marker = MARKERS[number % len(MARKERS)]
                style = "-" if planner in OURS else ":"
                axes.plot(*zip(*points, strict=True), marker + style, markersize=4, label=planner)
            axes.set(xlabel="measured peak, MiB", ylabel="measured step time, CPU ms", title=network)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path, dpi=160)


def _cell(execution: Execution) -> str:
    over = "" if execution.fits else ", over"
    return f"{execution.ratio:.3f} ({1000 * execution.step_s:.0f}, {execution.peak_bytes / MIB:.1f}{over})"

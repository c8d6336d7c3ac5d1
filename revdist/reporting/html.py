"""Pages of a run and of a plan: one HTML file that needs nothing beside it, for a browser or an attachment."""

from __future__ import annotations

import base64
import os
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from revdist.errors import format_bytes
from revdist.planning.costs import Mode
from revdist.reporting.figure import to_svg
from revdist.reporting.history import Line, RunHistory, read_history
from revdist.reporting.palette import MODE_COLORS, MODE_OF_LETTER, MODE_WORDS
from revdist.reporting.phrases import REASONS, mode_counts, rate, seconds
from revdist.reporting.plan_study import Study, best_batch, headline, letter, one_more
from revdist.reporting.run_figures import MAX_RANKS, figures
from revdist.reporting.summary import gain_sentences

MAX_ROWS = 500
"""Plans and events listed; a longer run names how many it leaves out and the file that has them."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Works for runs that are finished, cut off or still going on. Raises UsageError where `run_dir`
    is not a run directory.
    """
    target = run_dir / "report.html"
    text = render_report(read_history(run_dir))
    partial = target.with_suffix(".html.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target


def render_report(history: RunHistory) -> str:
    """The page. Everything that came from the run is escaped: names, details, configuration."""
    return _render(
        "report.html.jinja",
        title=history.name,
        history=history,
        facts=_facts(history),
        gains=_gains(history),
        figures=_figures(history),
        plans=[_plan_row(history, plan) for plan in history.plans[:MAX_ROWS]],
        events=[_event_row(history, event) for event in history.events[:MAX_ROWS]],
        hidden_plans=max(0, len(history.plans) - MAX_ROWS),
        hidden_events=max(0, len(history.events) - MAX_ROWS),
        hidden_ranks=max(0, len(history.ranks) - MAX_RANKS),
    )


def plan_page(found: Study, figure: Figure, *, title: str) -> str:
    """What `revdist plan` knows, as a page."""
    rows = [
        {
            "letter": letter(index),
            "device": choice.device,
            "budget_bytes": choice.budget_bytes,
            "need_bytes": choice.schedule.need_bytes,
            "extra_s": choice.schedule.extra_s,
            "best": best_batch(found, choice.budget_bytes),
            **_strip(choice.schedule.strip),
        }
        for index, choice in enumerate(found.choices)
    ]
    return _render(
        "plan.html.jinja",
        title=title,
        headline=headline(found),
        sentence=one_more(found),
        rows=rows,
        figure=figure_uri(figure),
    )


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("revdist.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, seconds=seconds, rate=rate)
    modes = [(mode.letter, mode.value, MODE_WORDS[mode], MODE_COLORS[mode]) for mode in Mode]
    return environment.get_template(template).render(modes=modes, **values)


def _strip(strip: str) -> dict[str, Any]:
    """A schedule as cells to draw and as words."""
    cells = [(mode, MODE_COLORS[MODE_OF_LETTER[mode]]) for mode in strip if mode in MODE_OF_LETTER]
    return {"strip": strip, "cells": cells, "counts": mode_counts(strip)}


def figure_uri(figure: Figure) -> str:
    """A figure as a `data:` address, which keeps its own element ids to itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(to_svg(figure).encode()).decode()


SHOWN = {
    "learning": "Training loss and samples per second over time",
    "memory": "Memory and schedule of every rank over time",
}
"""What each figure of a run shows, for those who cannot see it."""


def _figures(history: RunHistory) -> list[tuple[str, str]]:
    """(address, what it shows) of every figure of the run."""
    return [(figure_uri(figure), SHOWN[name]) for name, figure in figures(history).items()]


def _facts(history: RunHistory) -> list[tuple[str, str]]:
    """The run in a line of numbers."""
    summary = history.summary
    if summary is None:
        steps = history.metrics[-1]["step"] if history.metrics else 0
        return [("state", "not finished"), ("steps so far", f"{steps:,}"), ("ranks", str(len(history.ranks)))]
    facts: list[tuple[str, str]] = []
    if summary.get("test_accuracy") is not None:
        facts.append(("test accuracy", f"{summary['test_accuracy']:.2%}"))
    if summary.get("test_loss") is not None:
        facts.append(("test loss", f"{summary['test_loss']:.4g}"))
    shown: dict[str, Any] = {"steps": "{:,}".format, "samples": "{:,}".format, "wall_s": seconds, "samples_per_s": rate}
    names = {"wall_s": "took", "samples_per_s": "samples/s"}
    facts += [(names.get(key, key), show(summary[key])) for key, show in shown.items() if summary.get(key) is not None]
    replans = sum(1 for plan in history.plans if plan.get("reason") not in ("start", "profile"))
    return [*facts, ("ranks", str(len(history.ranks))), ("replans", str(replans)), *_changes(history)]


def _changes(history: RunHistory) -> list[tuple[str, str]]:
    """Replicas lost and joined, and what steps waited for it; nothing where nothing happened."""
    kinds = Counter(str(event.get("kind")) for event in history.events)
    found = [(name, str(kinds[kind])) for name, kind in (("lost", "lost"), ("joined", "joined")) if kinds[kind]]
    paused_s = sum(float(line.get("pause_s") or 0.0) for line in history.metrics)
    return [*found, ("paused", seconds(paused_s))] if paused_s > 0 else found


def _gains(history: RunHistory) -> dict[str, Any]:
    gains = (history.summary or {}).get("gains") or {}
    return {"sentences": gain_sentences(gains), "basis": gains.get("basis", "")}


def _plan_row(history: RunHistory, plan: Line) -> dict[str, Any]:
    reason = str(plan.get("reason"))
    return {
        **plan,
        "at": plan["time"] - history.start_s,
        "why": REASONS.get(reason, reason),
        **_strip(str(plan.get("strip", ""))),
    }


def _event_row(history: RunHistory, event: Line) -> dict[str, Any]:
    detail = event.get("detail", "")
    return {
        "at": event["time"] - history.start_s,
        "step": event.get("step", ""),
        "kind": event.get("kind", ""),
        "rank": event.get("rank", ""),
        "device": history.device_name(event.get("device", "")),
        "detail": detail if isinstance(detail, str) else ", ".join(f"{k}: {v}" for k, v in dict(detail).items()),
    }

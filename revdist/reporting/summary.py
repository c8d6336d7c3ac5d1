"""What a person wants to know when a run has ended."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from revdist.reporting.live_state import RunState
from revdist.reporting.phrases import rate, seconds, shown_path


def gain_sentences(gains: Mapping[str, Any]) -> list[str]:
    """What the plan won, each against what, and on which basis.

    A gain is a ratio of step times: 1.25 reads `1.25 times as fast as ...`.
    """
    sentences = []
    for key, other in (
        ("over_all_invert", "rebuilding everything on every device"),
        ("over_equal_split", "an equal split of the batch"),
    ):
        ratio = gains.get(key)
        if ratio is not None:
            sentences.append(
                f"{ratio:.2f} times as fast as {other}" if abs(ratio - 1) >= 0.005 else f"as fast as {other}"
            )
    return sentences


def summary_panel(summary: Mapping[str, Any], state: RunState) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    accuracy = summary.get("test_accuracy")
    if accuracy is not None:
        grid.add_row("test accuracy", Text(f"{accuracy:.2%}", style="bold green"))
    if summary.get("test_loss") is not None:
        grid.add_row("test loss", f"{summary['test_loss']:.4g}")
    grid.add_row("trained", _trained(summary))
    gains = summary.get("gains") or {}
    sentences = gain_sentences(gains)
    if sentences:
        grid.add_row("the plan was", Text("\n".join(sentences)))
        if gains.get("basis"):
            grid.add_row("", Text(f"({gains['basis']})", style="dim"))
    if state.run_dir is not None:
        grid.add_row("run directory", Text(shown_path(state.run_dir), style="bold"))
        grid.add_row("look at it", Text(f"{command()} report {shown_path(state.run_dir)}"))
    return Panel(grid, title=Text(state.name, style="bold"), title_align="left", border_style="green", expand=False)


def command() -> str:
    """What to type for `revdist` here: its path, where it is not on PATH."""
    started_as = Path(sys.argv[0])
    if shutil.which("revdist") or started_as.name != "revdist":
        return "revdist"
    return shown_path(started_as.absolute())


def _trained(summary: Mapping[str, Any]) -> str:
    parts = []
    if "steps" in summary:
        parts.append(f"{summary['steps']} steps")
    if "samples" in summary:
        parts.append(f"{summary['samples']:,} samples")
    if "wall_s" in summary:
        parts.append(seconds(summary["wall_s"]))
    if "samples_per_s" in summary:
        parts.append(f"{rate(summary['samples_per_s'])} samples/s")
    return ", ".join(parts)

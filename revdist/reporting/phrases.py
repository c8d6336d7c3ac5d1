"""Numbers, plans and reasons in words a person reads at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from revdist.errors import format_bytes
from revdist.planning.costs import Mode, Plan
from revdist.reporting.palette import MODE_OF_LETTER

REASONS: dict[str, str] = {
    "start": "first plan",
    "profile": "its profile is ready",
    "memory-lost": "less memory is free",
    "memory-gained": "more memory is free",
    "share": "the batch is split anew",
    "joined": "a device joined",
    "lost": "a device was lost",
}


_UNITS = (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))


def byte_unit(values: Iterable[float]) -> tuple[str, int]:
    """The unit in which the largest value reads best, and its bytes."""
    largest = max(values, default=0)
    return next((pair for pair in reversed(_UNITS) if largest >= pair[1]), _UNITS[0])


def time_unit(values: Iterable[float]) -> tuple[str, float]:
    """The unit in which the largest value reads best, and its seconds."""
    largest = max(values, default=0.0)
    for name, scale in (("s", 1.0), ("ms", 1e-3)):
        if largest >= scale:
            return name, scale
    return "us", 1e-6


def seconds(value: float) -> str:
    """A duration: `840 us`, `12.3 ms`, `4.20 s`, `3:05 min`, `2:07:30 h`."""
    if value == 0:
        return "0 s"
    if value < 0.0009995:
        return f"{value * 1e6:.0f} us"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def rate(value: float) -> str:
    """Samples per second: three digits where they matter, whole numbers above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown_path(path: Path) -> str:
    """A path as one would type it from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def mode_counts(strip: str) -> str:
    """How many operators do what: `12 kept, 6 rebuilt`."""
    words = {Mode.SAVE: "kept", Mode.INVERT: "rebuilt", Mode.RECOMPUTE: "recomputed", Mode.OFFLOAD: "offloaded"}
    counts = Counter(strip)
    return ", ".join(f"{counts[mode.letter]} {word}" for mode, word in words.items() if counts[mode.letter])


def plan_change(plan: Plan, before: Plan | None, free_bytes: int | None) -> str:
    """Why a plan was adopted and what it changes, for one line of text.

    `before` is the plan that it replaces; None for the first.
    """
    reason = REASONS.get(plan.reason, plan.reason)
    if free_bytes is not None and plan.reason in ("memory-lost", "memory-gained"):
        reason = f"{reason} ({format_bytes(free_bytes)})"
    return f"{reason}: {'; '.join(_differences(plan, before))}"


def _differences(plan: Plan, before: Plan | None) -> Sequence[str]:
    now = mode_counts(plan.schedule.strip)
    if before is None:
        return (f"{plan.share} samples a step in micro-batches of {plan.micro_batch}", now)
    changes = []
    if plan.share != before.share:
        changes.append(f"share {before.share} -> {plan.share} samples")
    if plan.micro_batch != before.micro_batch:
        changes.append(f"micro-batch {before.micro_batch} -> {plan.micro_batch}")
    if plan.schedule.modes != before.schedule.modes:
        changes.append(f"{now} (was {mode_counts(before.schedule.strip)})")
    return changes or ("same schedule",)


def letters_used(strips: Sequence[str]) -> list[Mode]:
    """The modes that occur, in the order of `Mode`."""
    used = set().union(*map(set, strips)) if strips else set()
    return [mode for letter, mode in MODE_OF_LETTER.items() if letter in used]

from __future__ import annotations

import io

import pytest
from rich.console import Console
from sample_profiles import profile

from revdist.reporting.plan_study import study
from revdist.reporting.plan_view import study_view

MIB = 2**20


def shown(renderable: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_view_fits_the_terminal(width: int) -> None:
    text = shown(study_view(study([profile(8), profile(32)])), width)
    assert all(len(line) <= width for line in text.splitlines())


def test_the_view_says_what_there_is_to_know() -> None:
    text = shown(study_view(study([profile(2), profile(32)], [2**20, 8 * MIB, 14 * MIB])), 120)
    for part in ("12 operators", "micro-batch 32", "8.0 MiB", "14.0 MiB", "best batch", "S keep", "One more MiB"):
        assert part in text
    assert "1.0 MiB holds no schedule of a micro-batch of 32" in text
    assert "; one of " in text


def test_free_schedules_need_no_percentages() -> None:
    assert "+0%" in shown(study_view(study([profile()], [2**30])), 120)

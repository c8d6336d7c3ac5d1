"""`revdist plan` obeys the limit of reconstruction errors."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from sample_profiles import profile

from revdist.config import RunConfig
from revdist.reporting.plan_report import PlanRequest, report_plan
from revdist.reporting.profile_files import write_profiles


@pytest.mark.parametrize(("limit", "most"), [(None, "3.0e-03"), (2.5e-3, "2.0e-03")])
def test_no_plan_shown_exceeds_the_limit(tmp_path: Path, limit: float | None, most: str) -> None:
    errors = tuple(0.0 if index % 4 == 0 else 1e-3 for index in range(12))
    path = tmp_path / "card.json"
    write_profiles(path, [dataclasses.replace(profile(), reconstruction_error=errors)])
    config = RunConfig.from_mapping(
        {
            "model": {"factory": "revdist.models:revnet38"},
            "data": {"factory": "revdist.training.datasets:digits"},
            "global_batch": 32,
            "steps": 1,
            "planning": {"max_reconstruction_error": limit},
        }
    )
    console = Console(file=io.StringIO(), width=120)
    report_plan(console, PlanRequest(config=config, device_profile=path))
    assert f"by {most} with INVERT wherever it may be" in console.file.getvalue()  # type: ignore[attr-defined]

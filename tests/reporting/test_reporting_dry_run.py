from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console
from sample_profiles import profile
from test_reporting_tables import READING

from revdist.config import RunConfig
from revdist.devices.reading import Reading
from revdist.errors import BatchTooSmall, BudgetTooSmall
from revdist.planning.replay import replay
from revdist.reporting.dry_run import dry_run_view, plans_for

MIB = 2**20
PROFILES = (profile(8), profile(32))


def config(**keys: object) -> RunConfig:
    return RunConfig.from_mapping(
        {
            "model": {"factory": "revdist.models:revnet38"},
            "data": {"factory": "revdist.training.datasets:digits"},
            "global_batch": 64,
            "steps": 1,
            **keys,
        }
    )


def readings(*free_bytes: int) -> list[Reading]:
    return [
        dataclasses.replace(READING, name=f"cpu-{rank}", total_bytes=free, free_bytes=free, used_bytes=0, holders=())
        for rank, free in enumerate(free_bytes)
    ]


def test_unequal_devices_get_plans_of_their_own_that_fit() -> None:
    plans = plans_for(config(), readings(12 * MIB, 64 * MIB), PROFILES, fixed_bytes=2 * MIB)
    assert sum(plan.share for plan in plans) == 64
    assert plans[0].share <= plans[1].share
    assert "I" in plans[0].schedule.strip
    assert set(plans[1].schedule.strip) == {"S"}
    for plan in plans:
        assert plan.schedule.need_bytes <= plan.budget_bytes
    assert plans[0].budget_bytes <= 12 * MIB - 2 * MIB - MIB


def test_an_equal_share_is_kept_where_it_is_asked_for() -> None:
    equal = config(planning={"share": "equal"})
    plans = plans_for(equal, readings(12 * MIB, 64 * MIB), PROFILES, fixed_bytes=0)
    assert [plan.share for plan in plans] == [32, 32]


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(BudgetTooSmall, match="cpu-0"):
        plans_for(config(), readings(2 * MIB), PROFILES, fixed_bytes=2 * MIB)
    small = config(global_batch=1)
    with pytest.raises(BatchTooSmall):
        plans_for(small, readings(64 * MIB, 64 * MIB), PROFILES, fixed_bytes=0)


def test_the_view_shows_configuration_devices_and_plan() -> None:
    settings, devices = config(), readings(12 * MIB, 64 * MIB)
    plans = plans_for(settings, devices, PROFILES, fixed_bytes=0)
    console = Console(file=io.StringIO(), width=110)
    console.print(dry_run_view(settings, devices, plans))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("global_batch: 64", "cpu-1", "64.0 MiB", "micro-batch", plans[1].schedule.strip):
        assert part in text


def test_the_timeline_of_a_plan_is_within_its_budget() -> None:
    plan, *_ = plans_for(config(), readings(12 * MIB), PROFILES[:1], fixed_bytes=0)
    assert replay(PROFILES[0], plan.schedule.modes).need_bytes <= plan.budget_bytes

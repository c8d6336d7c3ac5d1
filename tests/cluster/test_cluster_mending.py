"""Who is lost is found out at once, as far as this host can tell."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any, cast

import pytest
from runs import cpu_reading, settings

from revdist.cluster.actor import Location
from revdist.cluster.crew import Crew
from revdist.cluster.fleet import Fleet, Lost
from revdist.cluster.groups import Groups
from revdist.cluster.mending import Mender
from revdist.cluster.processes import Process
from revdist.cluster.shares import ShareKeeper
from revdist.config import RunConfig


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three that stand for replicas."""
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    yield started
    kill(*started)


def mender(processes: list[subprocess.Popen[bytes]], **changes: Any) -> Mender:
    locations = {}
    for member, process in enumerate(processes):
        found = Process.of(process.pid)
        assert found is not None
        where = {"host": "here", "address": "127.0.0.1", "store_port": member, "pid": process.pid}
        reading = cpu_reading(f"cpu-{member}", uuid=f"CPU-{member}", host="here")
        locations[member] = Location(**{"reading": reading, "started": found.started, **where, **changes})
    groups = Groups("run")
    groups.meet(list(locations), list(locations.values()))
    crew = Crew(fleet=cast(Fleet, None), groups=groups, locations=locations, places={})
    config = RunConfig.from_mapping(settings())
    return Mender(config, crew, ShareKeeper(config, tuple(locations)), assign=cast(Any, None), event=print)


def kill(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def test_at_the_first_loss_other_deaths_on_this_host_are_found_too(processes: list[subprocess.Popen[bytes]]) -> None:
    mending = mender(processes)
    kill(processes[0], processes[2])
    mending.find_dead(())
    assert mending.left == [0, 1, 2]  # the first one Ray tells, with the cause
    mending.take_failure(2, Lost(2, "SIGKILL"), ended=())
    mending.find_dead(())
    assert sorted(mending.failures) == [0, 2]
    assert mending.left == [1]


def test_one_that_has_come_to_its_end_is_not_lost(processes: list[subprocess.Popen[bytes]]) -> None:
    mending = mender(processes)
    kill(processes[0], processes[2])
    mending.take_failure(2, Lost(2, "SIGKILL"), ended={0})
    mending.find_dead({0})
    assert sorted(mending.failures) == [2]


def test_processes_that_cannot_be_seen_from_here_are_left_to_ray(processes: list[subprocess.Popen[bytes]]) -> None:
    """Another host's, or another container's, whose number is somebody else's here."""
    mending = mender(processes, started="on another boot:1")
    kill(processes[0])
    mending.take_failure(2, Lost(2, "SIGKILL"), ended=())
    mending.find_dead(())
    assert sorted(mending.failures) == [2]

"""Runs inside somebody's Ray program: beside other actors, in a given placement group, several at once."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import ray
from runs import Watcher, settings

import revdist
from revdist.cluster.fleet import hosts
from revdist.cluster.trainer import Result

pytestmark = pytest.mark.usefixtures("devices_folder", "running_ray")


def values(**changes: Any) -> dict[str, Any]:
    return settings(tensorboard=False, epochs=None, steps=6, **changes)


@pytest.mark.timeout(120)
def test_replicas_go_in_the_given_placement_group_alone(tmp_path: Path) -> None:
    group = ray.util.placement_group([{"CPU": 1}, {"CPU": 1}])
    ray.get(group.ready(), timeout=60)
    outside = sum(host.cpus for host in hosts())
    seen: list[tuple[float, list[float]]] = []

    def look(step: int) -> None:
        if step == 2:
            seen.append((sum(host.cpus for host in hosts()), [host.cpus for host in hosts(group)]))

    watcher = Watcher(look)
    try:
        result = revdist.Trainer(
            values(devices="auto"), observer=watcher, run_dir=tmp_path / "run", placement_group=group
        ).fit()
    finally:
        ray.util.remove_placement_group(group)
    assert result.metrics["steps"] == 6
    assert seen == [(outside, [0.0, 0.0])]
    assert len({reading.uuid for reading in watcher.devices}) == 2


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_runs_at_once_compute_on_devices_of_their_own(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=90)

    def meet(step: int) -> None:
        if step == 1:
            both.wait()  # both are training at this moment

    watchers = [Watcher(meet), Watcher(meet)]
    results: dict[int, Any] = {}

    def train(number: int) -> None:
        try:
            results[number] = revdist.Trainer(
                values(devices="auto", seed=number), observer=watchers[number], run_dir=tmp_path / f"run-{number}"
            ).fit()
        except BaseException as error:
            both.abort()
            results[number] = traceback.format_exception(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=150)
    for number in (0, 1):
        assert isinstance(results[number], Result), "".join(results[number])
        assert results[number].metrics["steps"] == 6
    uuids = [reading.uuid for watcher in watchers for reading in watcher.devices]
    assert len(set(uuids)) == 2


@ray.remote(num_cpus=0)
class Counter:
    """Somebody else's actor."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


@pytest.mark.timeout(120)
def test_other_actors_of_the_program_live_on(tmp_path: Path) -> None:
    counter = Counter.remote()
    watcher = Watcher(lambda step: ray.get(counter.add.remote()))
    revdist.Trainer(values(), observer=watcher, run_dir=tmp_path / "run").fit()
    assert ray.is_initialized()
    assert ray.get(counter.add.remote()) == 7
    ray.kill(counter)

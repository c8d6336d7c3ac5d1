"""The cluster and the runs of tests/cluster, and what a run that nothing happens to ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for folder in ("training", "cluster"):
    sys.path.append(str(Path(__file__).parent.parent / folder))


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    from revdist.cluster.local import ray_cluster

    with ray_cluster(None, num_workers=4):
        yield


@pytest.fixture(scope="session")
def unharmed(running_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """The final state of a run of so many steps to which nothing happens."""
    from harm import final_state, run
    from runs import Watcher

    states: dict[int, dict[str, Any]] = {}

    def state(steps: int) -> dict[str, Any]:
        if steps not in states:
            folder = tmp_path_factory.mktemp("unharmed")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("REVDIST_DEVICES_DIR", str(folder / "devices"))
                run(folder / "run", Watcher(), capacities=("64MiB",), epochs=None, steps=steps)
            states[steps] = final_state(folder / "run")
        return states[steps]

    return state

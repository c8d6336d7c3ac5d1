"""One Ray cluster for all tests of the cluster, as a user's program would have it running already."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Network, three_with_ray

sys.path.append(str(Path(__file__).parent.parent / "training"))  # the small models

from revdist.cluster.local import ray_cluster


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    with ray_cluster(None, num_workers=4):
        yield


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Three hosts with Ray on them, the head first."""
    with three_with_ray(tmp_path) as made:
        yield made

"""One Ray cluster for all tests of the cluster, as a user's program would have it running already."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "training"))  # the small models

from revdist.cluster.local import ray_cluster


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    with ray_cluster(None, num_workers=4):
        yield

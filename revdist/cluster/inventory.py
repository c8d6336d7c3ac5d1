"""Every device of a cluster: each host reads its own, in a process that holds nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from revdist.cluster.local import ray_cluster
from revdist.devices.reading import Reading

ANSWER_S = 20.0
"""A host that has not answered by then is listed as unusable: a first answer waits for a process to start."""


@contextmanager
def cluster_devices(address: str) -> Iterator[Callable[[], list[Reading]]]:
    """Connect to the cluster at `address`; what is yielded reads all of its devices, the driver's host first.

    Raises AddressUnreachable where no Ray cluster listens there.
    """
    with ray_cluster(address, num_workers=0):
        yield read_all


def read_all() -> list[Reading]:
    """Devices of every host of the connected cluster. A host that does not answer is listed with its trouble."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from revdist.cluster.fleet import hosts

    folder = os.environ.get("REVDIST_DEVICES_DIR")
    task = ray.remote(num_cpus=0)(_read_host)
    calls: dict[str, Any] = {
        host.address: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False)).remote(
            folder
        )
        for host in hosts()
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
    readings: list[Reading] = []
    for address, call in calls.items():
        try:
            readings.extend(ray.get(call, timeout=0))
        except RayError as error:
            readings.append(_no_answer(address, type(error).__name__))
    return readings


def _read_host(folder: str | None) -> list[Reading]:
    from revdist.devices import list_devices

    return list_devices(directory=folder)


def _no_answer(address: str, reason: str) -> Reading:
    return Reading(
        uuid="",
        name="host",
        kind="cpu",
        index=0,
        host=address,
        total_bytes=0,
        free_bytes=0,
        used_bytes=0,
        time_s=time.time(),
        note=f"{address} does not answer ({reason})",
    )

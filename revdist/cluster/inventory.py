"""Every device of a cluster: each host reads its own, in a process that holds nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from revdist.cluster.local import ray_cluster
from revdist.cluster.placement import Host
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
    from revdist.cluster.fleet import hosts

    readings: list[Reading] = []
    for host, answer in _ask(hosts()):
        readings.extend([_no_answer(host.address, answer)] if isinstance(answer, str) else answer)
    return readings


def uuids(hosts: Sequence[Host]) -> dict[str, frozenset[str]]:
    """Per node: the UUIDs of its devices. Hosts that do not answer are left out."""
    one_per_node = {host.node_id: host for host in hosts}.values()
    return {
        host.node_id: frozenset(reading.uuid for reading in answer)
        for host, answer in _ask(list(one_per_node))
        if not isinstance(answer, str)
    }


def _ask(hosts: Sequence[Host]) -> list[tuple[Host, list[Reading] | str]]:
    """Each host's devices, or why it does not answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = os.environ.get("REVDIST_DEVICES_DIR")
    task = ray.remote(num_cpus=0)(_read_host)
    calls: list[Any] = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False)).remote(folder)
        for host in hosts
    ]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    answers: list[tuple[Host, list[Reading] | str]] = []
    for host, call in zip(hosts, calls, strict=True):
        try:
            answers.append((host, ray.get(call, timeout=0)))
        except RayError as error:
            answers.append((host, type(error).__name__))
    return answers


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

"""Replicas go where there are devices for them."""

from __future__ import annotations

from typing import Any

import pytest
from runs import settings

from revdist.cluster.placement import Host, place
from revdist.config import RunConfig
from revdist.errors import BatchTooSmall, NoFreeDevice


def host(number: int, *, cpus: float = 8, gpus: float = 0) -> Host:
    return Host(node_id=f"node-{number}", address=f"10.0.0.{number}", cpus=cpus, gpus=gpus)


def placed(hosts: list[Host], **changes: Any) -> list[tuple[str, str, str]]:
    """Per rank: host, kind and name."""
    places = place(RunConfig.from_mapping(settings(**changes)), hosts)
    assert [entry.rank for entry in places] == list(range(len(places)))
    return [(entry.node_id, entry.spec.kind, entry.spec.name) for entry in places]


def test_without_a_list_every_free_gpu_is_used() -> None:
    found = placed([host(0, gpus=2), host(1, gpus=1)], devices="auto")
    assert found == [("node-0", "cuda", ""), ("node-0", "cuda", ""), ("node-1", "cuda", "")]


def test_without_gpus_every_host_is_one_device() -> None:
    assert placed([host(0), host(1)], devices="auto") == [("node-0", "cpu", "cpu-0"), ("node-1", "cpu", "cpu-0")]


def test_cpu_devices_are_dealt_out_and_ranks_of_a_host_are_neighbours() -> None:
    devices = [{"kind": "cpu", "capacity": "1MiB"}] * 4
    found = placed([host(0), host(1)], devices=devices)
    assert found == [
        ("node-0", "cpu", "cpu-0"),
        ("node-0", "cpu", "cpu-1"),
        ("node-1", "cpu", "cpu-0"),
        ("node-1", "cpu", "cpu-1"),
    ]


def test_given_names_are_kept_and_the_others_avoid_them() -> None:
    devices = [{"kind": "cpu", "name": "cpu-0"}, {"kind": "cpu"}, {"kind": "cpu", "name": "big"}]
    assert [name for _, _, name in placed([host(0)], devices=devices)] == ["cpu-0", "cpu-1", "big"]


def test_a_name_twice_on_one_host_is_refused() -> None:
    with pytest.raises(NoFreeDevice, match="two replicas would share the device cpu-0"):
        placed([host(0)], devices=[{"kind": "cpu", "name": "cpu-0"}] * 2)


def test_a_busy_host_is_left_out() -> None:
    found = placed([host(0, cpus=1), host(1, cpus=8)], devices=[{"kind": "cpu"}] * 3)
    assert [node for node, _, _ in found] == ["node-0", "node-1", "node-1"]


def test_too_few_devices_say_what_is_there() -> None:
    with pytest.raises(NoFreeDevice, match=r"no free GPU.*Ray has 1 free on 1 hosts"):
        placed([host(0, gpus=1)], devices=[{"kind": "cuda"}] * 2)
    with pytest.raises(NoFreeDevice, match="each replica takes 1 and Ray has 1 free"):
        placed([host(0, cpus=1)])
    with pytest.raises(NoFreeDevice, match="1 devices are free and the run wants 2"):
        placed([host(0, gpus=1)], devices="auto", workers={"min": 2})


def test_the_number_of_replicas_can_be_limited() -> None:
    assert len(placed([host(0, gpus=8)], devices="auto", workers={"max": 3})) == 3


def test_a_batch_must_give_every_replica_a_sample() -> None:
    with pytest.raises(BatchTooSmall):
        placed([host(0)], global_batch=1)

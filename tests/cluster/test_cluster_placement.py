"""Replicas go where there are devices for them."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
from runs import settings

from revdist.cluster.placement import Host, Place, missing, place, place_another
from revdist.config import DeviceSpec, RunConfig
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


def test_a_gpu_with_a_uuid_is_found_on_its_host() -> None:
    hosts = [
        dataclasses.replace(host(number, gpus=2), uuids=frozenset(f"GPU-{number}{letter}" for letter in "ab"))
        for number in range(2)
    ]
    listed = ["", "GPU-1b", "GPU-0a", "GPU-1a"]
    config = RunConfig.from_mapping(settings(devices=[{"kind": "cuda", "uuid": uuid} for uuid in listed]))
    places = place(config, hosts)
    assert [(entry.node_id, entry.spec.uuid) for entry in places] == [
        ("node-0", "GPU-0a"),
        ("node-0", ""),
        ("node-1", "GPU-1b"),
        ("node-1", "GPU-1a"),
    ]
    lost = [dataclasses.replace(places[2], node_id="node-1 before its host was lost")]
    for here, found in ((hosts, "node-1"), (hosts[:1], None)):
        newcomer = place_another(config, here, places[:2], lost, rank=-1)
        assert found == (newcomer and newcomer.node_id)


def test_a_uuid_that_no_host_has_is_told() -> None:
    away = dataclasses.replace(host(0, gpus=2), uuids=frozenset({"GPU-0"}))
    with pytest.raises(NoFreeDevice, match="no device GPU-9 on 1 hosts"):
        placed([away], devices=[{"kind": "cuda", "uuid": "GPU-9"}])
    with pytest.raises(NoFreeDevice, match="the host of GPU-0 has no free GPU"):
        placed([dataclasses.replace(away, gpus=0)], devices=[{"kind": "cuda", "uuid": "GPU-0"}])


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


THREE = [{"kind": "cpu", "name": f"cpu-{number}", "capacity": "1MiB"} for number in range(3)]


def another(hosts: list[Host], taken: list[Place], lost: list[Place], **changes: Any) -> tuple[str, str] | None:
    config = RunConfig.from_mapping(settings(**changes))
    found = place_another(config, hosts, taken, lost, rank=-1)
    return None if found is None else (found.node_id, found.spec.name)


def test_listed_devices_beyond_the_most_replicas_are_spares() -> None:
    assert [name for _, _, name in placed([host(0)], devices=THREE, workers={"max": 2})] == ["cpu-0", "cpu-1"]


def test_a_lost_replica_is_replaced_on_its_own_host_before_others() -> None:
    config = RunConfig.from_mapping(settings(devices=THREE))
    first, lost, *_ = place(config, [host(0), host(1)])
    assert another([host(0), host(1)], [first], [lost], devices=THREE) == (lost.node_id, lost.spec.name)
    elsewhere = [host(2)]
    assert another(elsewhere, [first], [lost], devices=THREE) == ("node-2", lost.spec.name)


def test_no_replica_goes_where_no_core_is_free_or_the_device_has_one() -> None:
    config = RunConfig.from_mapping(settings(devices=THREE))
    first, second, third = place(config, [host(0)])
    assert another([host(0, cpus=0)], [first, second], [third], devices=THREE) is None
    assert another([host(0)], [first, second, third], [third], devices=THREE) is None
    assert another([host(0)], [first, second, third], [], devices=THREE) is None


def test_a_host_that_joins_is_a_further_device_where_devices_are_automatic() -> None:
    (first,) = place(RunConfig.from_mapping(settings(devices="auto")), [host(0)])
    assert another([host(0), host(1)], [first], [], devices="auto") == ("node-1", "cpu-0")
    assert another([host(0)], [first], [], devices="auto") is None
    assert another([host(0), host(1)], [first], [], devices=THREE) is None


@pytest.mark.parametrize(
    ("devices", "there", "absent"),
    [
        ([{"kind": "cuda"}] * 3, [0, 1], [{"kind": "cuda"}]),
        ([{"kind": "cuda", "uuid": f"GPU-{n}"} for n in range(3)], [0, 2], [{"kind": "cuda", "uuid": "GPU-1"}]),
        ([{"kind": "cpu", "name": "cpu-0"}] * 2, [0], [{"kind": "cpu", "name": "cpu-0"}]),
        ([{"kind": "cpu"}, {"kind": "cpu", "name": "big"}], [1], [{"kind": "cpu"}]),
        (
            [{"kind": "cpu", "capacity": "1MiB"}, {"kind": "cpu", "capacity": "2MiB"}],
            [1],
            [{"kind": "cpu", "capacity": "1MiB"}],
        ),
    ],
    ids=["GPUs", "GPUs by UUID", "one name on two hosts", "one without a name", "capacities"],
)
def test_devices_listed_that_have_no_replica_are_missing(
    devices: list[dict[str, str]], there: list[int], absent: list[dict[str, str]]
) -> None:
    config = RunConfig.from_mapping(settings(devices=devices))
    places = place(config, [host(0, cpus=1, gpus=2), host(1, gpus=2)])
    found = missing(cast(Any, config.devices), [places[rank] for rank in there])
    assert found == [DeviceSpec.model_validate(one) for one in absent]


def test_a_device_listed_without_a_name_gets_one_that_is_free_on_its_host() -> None:
    devices = [{"kind": "cpu"}, {"kind": "cpu"}, {"kind": "cpu", "name": "cpu-1"}]
    config = RunConfig.from_mapping(settings(devices=devices))
    first, *_ = place(config, [host(0)])
    lost = [Place(rank=-1, node_id="", address="", spec=DeviceSpec(kind="cpu"))]
    assert another([host(0)], [first], lost, devices=devices) == ("node-0", "cpu-2")
    assert another([host(1)], [first], lost, devices=devices) == ("node-1", "cpu-0")


def test_what_was_lost_goes_back_to_its_own_host_while_another_lost_one_s_is_away() -> None:
    hosts = [host(number, gpus=1) for number in range(3)]
    first, *lost = place(RunConfig.from_mapping(settings(devices="auto")), hosts)
    assert another([host(2, gpus=1)], [first], lost, devices="auto") == ("node-2", "")
    assert another([host(1, gpus=1), host(2, gpus=1)], [first], lost[1:], devices="auto") == ("node-2", "")


def test_a_bundle_that_was_lost_is_no_new_one_beside_another_of_its_host() -> None:
    bundles = [dataclasses.replace(host(0, cpus=1), bundle=number) for number in range(2)]
    config = RunConfig.from_mapping(settings(devices="auto"))
    first, lost = place(config, bundles)
    found = place_another(config, bundles, [first], [lost], rank=-1)
    assert found is not None
    assert found.bundle == 1
    assert place_another(config, bundles, [first], [lost], rank=-1, replace=False) is None


def test_bundles_of_a_placement_group_are_places_of_their_own() -> None:
    bundles = [dataclasses.replace(host(0, cpus=1), bundle=number) for number in range(2)]
    places = place(RunConfig.from_mapping(settings(devices="auto")), bundles)
    assert [(entry.bundle, entry.any_device) for entry in places] == [(0, True), (1, True)]
    with pytest.raises(NoFreeDevice):
        place(RunConfig.from_mapping(settings(devices=THREE)), bundles)


def test_a_part_of_the_devices_will_do_where_a_run_starts_again() -> None:
    devices = [{"kind": "cpu", "capacity": "1MiB"}] * 4
    config = RunConfig.from_mapping(settings(devices=devices, workers={"min": 2}))
    with pytest.raises(NoFreeDevice):
        place(config, [host(0, cpus=3)])
    assert [entry.spec.name for entry in place(config, [host(0, cpus=3)], partly=True)] == ["cpu-0", "cpu-1", "cpu-2"]
    with pytest.raises(NoFreeDevice, match="1 devices are free and the run wants 2"):
        place(config, [host(0, cpus=1)], partly=True)

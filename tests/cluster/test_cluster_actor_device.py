"""The device that a replica opens on its host."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from revdist.cluster.actor import ReplicaActor
from revdist.cluster.placement import Place
from revdist.config import DeviceSpec
from revdist.devices.cpu import CpuDevice
from revdist.devices.host import host_memory
from revdist.devices.reading import Reading

MIB = 2**20
MakeDevice = Callable[..., CpuDevice]


def opened(*, any_device: bool, name: str = "cpu-0", capacity: int | None = None) -> Reading:
    spec = DeviceSpec(kind="cpu", name=name, capacity=capacity)
    place = Place(rank=0, node_id="here", address="127.0.0.1", spec=spec, any_device=any_device)
    return ReplicaActor(place, {}, [], None).locate("127.0.0.1").reading


@contextmanager
def another_process(action: str) -> Iterator[None]:
    """One that has opened cpu-0, and done that with it."""
    code = f"from revdist.devices.cpu import CpuDevice; device = CpuDevice.open('cpu-0'); {action}; input('done')"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.read(4) == b"done"
        yield
        other.communicate(b"end\n")


@pytest.mark.parametrize("any_device", [True, False])
def test_a_device_that_a_run_before_has_left_gets_what_the_host_has_free(
    ledger_device: MakeDevice, any_device: bool
) -> None:
    ledger_device(4 * MIB)
    assert opened(any_device=any_device).total_bytes > host_memory()[1] // 2


def test_a_device_keeps_a_capacity_that_is_asked_for(ledger_device: MakeDevice) -> None:
    ledger_device(4 * MIB)
    assert opened(any_device=False, capacity=8 * MIB).total_bytes == 8 * MIB
    ledger_device(6 * MIB, "big")
    assert opened(any_device=False, name="big").total_bytes == 6 * MIB


def test_a_device_that_another_process_uses_stays_as_it_is(ledger_device: MakeDevice) -> None:
    ledger_device(4 * MIB)
    with another_process("device._ledger.claim_slot('neighbour')"):
        assert opened(any_device=True).total_bytes == 4 * MIB


def test_beside_another_replica_a_further_device_gets_half(ledger_device: MakeDevice) -> None:
    for name in ("cpu-0", "cpu-1"):
        ledger_device(4 * MIB, name)
    with another_process("assert device.reserve()"):
        assert opened(any_device=False).total_bytes == 4 * MIB
        reading = opened(any_device=True)
    assert reading.name == "cpu-1"
    assert host_memory()[1] // 4 < reading.total_bytes < host_memory()[1]

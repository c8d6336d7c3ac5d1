"""Training over several hosts: who takes part, that the result is one host's, and which networks it touches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from fake_driver import FakeDriver
from hosts import PYTHON, RAY_PORT, Host, Network
from runs import settings
from witness import notes

from revdist.devices.cpu import CpuDevice
from revdist.training.checkpoint import read_state
from revdist.training.checkpoint_files import newest
from revdist.training.run_directory import RunReader

STEPS = 6
BOUND = 1e-9
"""Largest difference of a weight in fp64 between one host and three: sums in another order."""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(240),
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run and what its replicas wrote down."""

    folder: Path

    @property
    def reader(self) -> RunReader:
        return RunReader(self.folder / "run")

    @property
    def notes(self) -> list[dict[str, Any]]:
        return list(notes(self.folder))

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return read_state(newest(self.folder / "run" / "checkpoints"))

    def events(self, kind: str) -> list[Any]:
        return [event for event in self.reader.events() if event["kind"] == kind]


def launch(host: Host, folder: Path, *arguments: str, model: dict[str, Any] | None = None, **changes: Any) -> Run:
    """Run `revdist launch` on a host to its end."""
    folder.mkdir()
    values = settings(
        model={"factory": "witness:watched_classifier", "kwargs": {"folder": str(folder), **(model or {})}},
        precision="fp64",
        tensorboard=False,
        **{"epochs": None, "steps": STEPS, **changes},
    )
    (folder / "run.json").write_text(json.dumps(values))
    done = host.revdist("launch", folder / "run.json", "--run-dir", folder / "run", *arguments)
    assert done.returncode == 0, done.text
    return Run(folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Three hosts with Ray on them, the head first."""
    with hosts.three_with_ray(tmp_path_factory.mktemp("network")) as network:
        yield network.hosts


@pytest.fixture(scope="module")
def address(cluster: list[Host]) -> str:
    return f"{cluster[0].address}:{RAY_PORT}"


@pytest.fixture(scope="module")
def on_three(cluster: list[Host], address: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on whatever the cluster has: a device a host."""
    return launch(cluster[0], tmp_path_factory.mktemp("three") / "it", "--address", address, devices="auto")


def test_devices_of_all_hosts_are_listed(cluster: list[Host], address: str) -> None:
    listed = cluster[0].revdist("devices", "--address", address)
    assert listed.returncode == 0, listed.text
    rows = [line.split() for line in listed.text.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["cpu-0"]] == [host.name for host in cluster]


def test_every_host_takes_part_and_the_weights_are_those_of_one_host(
    cluster: list[Host], on_three: Run, tmp_path: Path
) -> None:
    (start,) = on_three.events("start")
    assert [device["host"] for device in start["devices"]] == [host.name for host in cluster]
    assert {note["host"] for note in on_three.notes} == {host.name for host in cluster}
    assert [step["step"] for step in on_three.reader.metrics()] == list(range(1, STEPS + 1))
    assert all(len(step["ranks"]) == 3 for step in on_three.reader.metrics())
    alone = launch(cluster[0], tmp_path / "alone", capacities=("64MiB",))
    assert {note["host"] for note in alone.notes} == {cluster[0].name}
    for name, tensor in alone.state.items():
        torch.testing.assert_close(on_three.state[name], tensor, rtol=0, atol=BOUND, msg=name)


def test_user_code_finds_the_first_host_and_its_own_place(cluster: list[Host], on_three: Run) -> None:
    for note in on_three.notes:
        assert note["MASTER_ADDR"] == cluster[0].address
        assert (note["WORLD_SIZE"], note["LOCAL_RANK"]) == ("3", "0")
        assert cluster[int(note["RANK"])].name == note["host"]


def test_replicas_listen_on_the_network_of_the_cluster_alone(cluster: list[Host], on_three: Run) -> None:
    """Ray's own sockets listen on every one; its token says who is let in."""
    own = {host.name: host.address for host in cluster}
    seen = [note for note in on_three.notes if "listens" in note]
    assert len(seen) == 3
    for note in seen:
        elsewhere = [place for place in note["listens"] if place[0] != own[note["host"]]]
        assert len(elsewhere) <= 1, "Ray's own socket"
        assert all(place in note["before"] for place in elsewhere)
        own_store = [note["MASTER_ADDR"], int(note["MASTER_PORT"])]
        assert (own_store in note["listens"]) == (note["RANK"] == "0")
        peers = [(local, remote) for local, _, remote, _ in note["connects"] if remote in set(own.values())]
        assert {remote for _, remote in peers} >= set(own.values()) - {own[note["host"]]}
        assert {local for local, _ in peers} == {own[note["host"]]}


def test_listed_devices_are_dealt_out_over_hosts_and_the_slow_one_gets_less(
    cluster: list[Host], address: str, tmp_path: Path
) -> None:
    devices = [{"kind": "cpu", "name": name, "capacity": "64MiB"} for name in ("fast", "slow")]
    run = launch(
        cluster[0],
        tmp_path / "listed",
        "--address",
        address,
        devices=devices,
        global_batch=40,
        steps=30,
        model={"slow_host": cluster[1].name, "seconds_per_sample": 0.01},
    )
    (start,) = run.events("start")
    assert [(device["name"], device["host"]) for device in start["devices"]] == [
        ("fast", cluster[0].name),
        ("slow", cluster[1].name),
    ]
    last = list(run.reader.metrics())[-1]["ranks"]
    assert last[0]["share"] > 2 * last[1]["share"]


def test_nothing_of_a_run_is_left_on_any_host(cluster: list[Host], on_three: Run) -> None:
    replicas = {(note["host"], note["pid"]) for note in on_three.notes}  # each host counts its processes by itself
    assert len(replicas) == 3
    for host in cluster:
        assert not [process for process in host.processes() if "ReplicaActor" in " ".join(process.cmdline())]


_WHERE = """
import json, sys
import revdist
print("where", json.dumps([
    (one.host, one.uuid) for one in revdist.Trainer(json.loads(sys.argv[1]), address=sys.argv[2]).dry_run()
]))
"""


def test_gpus_listed_by_uuid_are_found_on_their_hosts(
    fake_driver_library: Path, ledger_device: Callable[..., CpuDevice], tmp_path: Path
) -> None:
    with Network(tmp_path) as network:
        uuids = []
        for number in range(2):
            host = network.add()
            driver = FakeDriver(fake_driver_library, host.home)
            ledgers = [ledger_device(2**26, f"gpu-{number}{gpu}").ledger_path for gpu in range(2)]
            uuids += [driver.add_gpu(ledger) for ledger in ledgers]
            host.start_ray(network.hosts[0] if number else None, environment=driver.env)
        devices = [{"kind": "cuda", "uuid": uuids[number]} for number in (3, 0, 2, 1)]
        head, other = network.hosts
        address = f"{head.address}:{RAY_PORT}"
        said = head.check([PYTHON, "-c", _WHERE, json.dumps(settings(devices=devices)), address])
        where = json.loads(said.partition("where ")[2].splitlines()[0])
        assert where == [[head.name, uuids[0]], [head.name, uuids[1]], [other.name, uuids[3]], [other.name, uuids[2]]]

"""The host of the Ray head loses power or its link, and is back in time: training goes on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import hosts
import psutil
import pytest
from host_runs import Run, assert_nothing_was_lost, unharmed
from hosts import RAY_PORT, Host, Network
from witness import hurry

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
]

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"


def on_disk(head: Host) -> Mapping[str, str]:
    """Settings of a head that keeps its state on its disk."""
    folder = head.home / "gcs"
    folder.mkdir(exist_ok=True)
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(folder)}


def answers(head: Host, to: Host) -> bool:
    """Whether the head can be reached from another host."""
    return to.run([hosts.PYTHON, "-c", CONNECT, head.address, str(RAY_PORT)]).returncode == 0


def has_ended(process: psutil.Process) -> bool:
    """Whether a process runs no more, though nobody may have collected it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Three hosts with Ray on them, the head first, which keeps its state on its disk."""
    with hosts.three_with_ray(tmp_path, head_settings=on_disk) as made:
        yield made


def test_a_head_host_that_is_power_cycled_costs_no_step(network: Network, tmp_path: Path) -> None:
    """It carries a replica as well, which is lost; a new one joins there, and so the head serves again."""
    run = Run(network, tmp_path / "it", number=1)
    head, host = network.hosts[0], network.hosts[1]
    run.wait_for_step(20)
    assert answers(head, host)
    before = head.processes()
    assert "gcs_server" in {process.name() for process in before}
    head.power_off()
    off_at = run.done[-1]["step"]
    assert all(has_ended(process) for process in before)
    assert not answers(head, host)
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    run.wait_for_step(run.done[-1]["step"] + 20)
    assert not answers(head, host)
    assert run.done[-1]["step"] >= off_at + 20
    assert len(run.done[-1]["ranks"]) == 2
    head.power_on()
    head.start_ray(environment=on_disk(head))
    run.wait_for("newcomer", lambda: bool(run.events("joined")), patience_s=150)
    assert head.name in run.events("joined")[0]["detail"]
    hurry(run.folder)
    run.finish()
    (lost,) = [event for event in run.events("lost") if "rank" in event]  # a newcomer that came too early has none
    assert head.name in lost["detail"]
    assert len(run.done[-1]["ranks"]) == 3
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))


def test_a_head_whose_link_is_cut_and_healed_in_time_is_not_missed(network: Network, tmp_path: Path) -> None:
    """Its replica is given up meanwhile and comes back as a newcomer, as any other host's does."""
    run = Run(network, tmp_path / "it", number=1)
    head, host = network.hosts[0], network.hosts[1]
    run.wait_for_step(20)
    head.cut_link()
    assert not answers(head, host)
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    run.wait_for_step(run.done[-1]["step"] + 20)
    assert not answers(head, host)
    assert len(run.done[-1]["ranks"]) == 2
    head.heal_link()
    assert answers(head, host)
    run.wait_for("newcomer", lambda: bool(run.events("joined")), patience_s=150)
    hurry(run.folder)
    run.finish()
    assert len([event for event in run.events("lost") if "rank" in event]) == 1
    assert len(run.done[-1]["ranks"]) == 3
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))

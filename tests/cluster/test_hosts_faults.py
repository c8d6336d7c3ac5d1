"""Hosts that lose power and links that are cut: the others go on, nothing is lost, and nobody goes on twice."""

from __future__ import annotations

import time
from pathlib import Path

import hosts
import pytest
from host_runs import MICRO_BATCHES, Run, assert_nothing_was_lost, unharmed
from hosts import Network
from witness import hurry, notes

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
]


def test_a_host_that_loses_power_is_done_without_and_one_that_boots_takes_its_place(
    network: Network, tmp_path: Path
) -> None:
    run = Run(network, tmp_path / "it")
    victim = network.hosts[2]
    run.wait_for_step(20)
    victim.power_off()
    at_the_end = len(run.notes_of(victim))
    run.wait_for("loss", lambda: bool(run.events("regroup")))
    (lost,) = run.events("lost")
    assert victim.name in lost["detail"]
    assert run.events("regroup")[0]["pause_s"] < 30
    assert len(run.done[-1]["ranks"]) == 2
    another = network.add()
    another.start_ray(run.head)
    run.wait_for("newcomer", lambda: bool(run.events("joined")))
    assert another.name in run.events("joined")[0]["detail"]
    hurry(run.folder)
    run.finish()
    assert len(run.done[-1]["ranks"]) == 3
    assert {note["host"] for note in notes(run.folder)} == {host.name for host in network.hosts}
    assert len(run.notes_of(victim)) == at_the_end
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))


def test_a_host_that_is_cut_off_takes_no_step_and_comes_back_as_a_newcomer(network: Network, tmp_path: Path) -> None:
    run = Run(network, tmp_path / "it")
    apart = network.hosts[2]
    run.wait_for_step(20)
    apart.cut_link()
    cut_s = time.time()
    run.wait_for("loss", lambda: bool(run.events("regroup")))
    run.wait_for_step(run.done[-1]["step"] + 20)
    alone = [note for note in run.notes_of(apart) if note["time"] > cut_s]
    assert len(alone) <= len(MICRO_BATCHES), "a cut-off replica went on by itself"
    before = {note["pid"] for note in run.notes_of(apart)}
    assert len(before) == 1
    assert len(run.done[-1]["ranks"]) == 2
    apart.heal_link()
    run.wait_for("newcomer", lambda: bool(run.events("joined")))
    hurry(run.folder)
    run.finish()
    assert len(run.done[-1]["ranks"]) == 3
    joined = run.events("joined")[0]
    assert apart.name in joined["detail"]
    after = [note for note in run.notes_of(apart) if note["time"] > cut_s and note["pid"] in before]
    assert after == alone, "the replica that was given up came back to life"
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))

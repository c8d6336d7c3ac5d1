"""The host of the supervisor loses power: replicas on the others wait, are found from there, or save and leave."""

from __future__ import annotations

import time
from pathlib import Path

import hosts
import psutil
import pytest
from host_runs import EVERY_STEPS, Run, assert_nothing_was_lost, launch, unharmed
from hosts import RAY_PORT, Host, Network
from witness import hurry

from revdist.training.checkpoint_files import newest_whole

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
]


def detached(network: Network, folder: Path, *, orphan_s: int) -> Run:
    """A detached run that was launched on the second host, some steps under way."""
    run = Run(network, folder, "--detach", number=1, environment={"REVDIST_ORPHAN_S": str(orphan_s)})
    run.wait_for_step(20)
    assert {note["host"] for host in network.hosts for note in run.notes_of(host)} == {h.name for h in network.hosts}
    return run


def lose(host: Host) -> None:
    """The driver and its watchman run there, and end with it."""
    drivers = [process for process in host.processes() if "revdist.cli" in command_line(process)]
    assert drivers
    host.power_off()
    assert not any(command_line(process) for process in drivers)


def resume(run: Run, host: Host) -> None:
    """Take the run up from another host."""
    address = f"{run.head.address}:{RAY_PORT}"
    run.popen = launch(host, run.folder, "--resume", "--address", address)


def replicas(host: Host) -> list[int]:
    return [process.pid for process in host.processes() if "ReplicaActor" in command_line(process)]


def command_line(process: psutil.Process) -> str:
    """Empty where the process has ended, though nobody may have collected it yet."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # as a zombie is
        return ""


def test_a_driver_on_another_host_finds_the_replicas_that_are_left(network: Network, tmp_path: Path) -> None:
    run = detached(network, tmp_path / "it", orphan_s=60)
    head, lost, other = network.hosts
    before = replicas(head) + replicas(other)
    assert len(before) == 2
    lose(lost)
    notes_at_the_end = len(run.notes_of(lost))
    resume(run, other)
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    assert sorted(replicas(head) + replicas(other)) == sorted(before), "it did not go on from memory"
    hurry(run.folder)
    run.finish()
    assert len(run.events("supervisor")) == 1
    assert not run.events("resumed")
    assert len(run.done[-1]["ranks"]) == 2
    assert len(run.notes_of(lost)) == notes_at_the_end
    assert not replicas(head) + replicas(other)
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))


def test_where_nobody_comes_the_replicas_that_are_left_save_and_leave(network: Network, tmp_path: Path) -> None:
    """They hang in a step with the lost one, whose end they need not see to save what they hold."""
    run = detached(network, tmp_path / "it", orphan_s=8)
    head, lost, other = network.hosts
    lose(lost)
    taken = run.done[-1]["step"]
    until_s = time.monotonic() + 60
    while replicas(head) + replicas(other):
        assert time.monotonic() < until_s, "replicas stayed"
        time.sleep(0.2)
    saved = newest_whole(run.folder / "run" / "checkpoints").checkpoint.step
    assert taken <= saved < EVERY_STEPS, "not saved by themselves"
    resume(run, other)
    run.wait_for_step(saved + 5)
    hurry(run.folder)
    run.finish()
    assert len(run.events("resumed")) == 1
    assert run.events("start")[-1]["step"] == saved
    unheard = set(range(taken + 1, saved + 1))
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"), unheard=unheard)

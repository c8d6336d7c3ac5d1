"""The host of the supervisor loses power: its deputy goes on, or a driver by hand, or replicas save and leave."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import hosts
import psutil
import pytest
from host_runs import EVERY_STEPS, Run, assert_nothing_was_lost, launch, unharmed
from hosts import RAY_PORT, Host, Network
from witness import hurry

from revdist.cluster.run_record import RunRecord, read_record
from revdist.errors import Preempted
from revdist.training.checkpoint_files import newest_whole

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
]


def detached(network: Network, folder: Path, *, orphan_s: int = 60, number: int = 1) -> Run:
    """A detached run, some steps under way. number: of the host that it was launched on."""
    run = Run(network, folder, "--detach", number=number, environment={"REVDIST_ORPHAN_S": str(orphan_s)})
    run.wait_for_step(20)
    run.wait_for("deputy", lambda: bool(record(run).deputy))
    assert {note["host"] for host in network.hosts for note in run.notes_of(host)} == {h.name for h in network.hosts}
    return run


def record(run: Run) -> RunRecord:
    found = read_record(run.folder / "run")
    assert found is not None
    return found


def lose(host: Host, *, deputies: Sequence[psutil.Process] = ()) -> None:
    """The driver and its watchman run there, and end with it. deputies: of theirs, which are lost as well."""
    drivers = [process for process in host.processes() if "revdist.cli" in command_line(process)]
    assert drivers
    for deputy in deputies:
        deputy.kill()
    host.power_off()
    assert not any(command_line(process) for process in drivers)


def deputies(*hosts: Host) -> list[psutil.Process]:
    """The processes on some hosts that could take a run over."""
    return [process for host in hosts for process in host.processes() if "ray::Deputy" in command_line(process)]


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


def test_a_deputy_on_another_host_goes_on_with_the_run(network: Network, tmp_path: Path) -> None:
    run = detached(network, tmp_path / "it")
    head, lost, other = network.hosts
    assert record(run).host == lost.name
    assert record(run).deputy == head.name
    before = replicas(head) + replicas(other)
    lose(lost)
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    assert sorted(replicas(head) + replicas(other)) == sorted(before), "it did not go on from memory"
    assert record(run).host == head.name
    run.wait_for("deputy", lambda: record(run).deputy == other.name)  # it has one itself
    hurry(run.folder)
    run.wait_for("end", lambda: record(run).ended_s is not None)
    assert record(run).exit_code == 0
    assert len(run.events("supervisor")) == 1
    assert not run.events("resumed")
    assert len(run.done[-1]["ranks"]) == 2
    run.wait_for("emptiness", lambda: not replicas(head) + replicas(other) + deputies(head, other))
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))


def test_where_the_ray_head_is_lost_with_it_the_deputy_goes_on_and_saves_in_time(
    network: Network, tmp_path: Path
) -> None:
    """Ray ends everything a minute after its head is gone; until then the run has gone on, saved and left."""
    run = detached(network, tmp_path / "it", number=0)
    head, *others = network.hosts
    assert record(run).host == head.name
    assert record(run).deputy in {host.name for host in others}
    lose(head)
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    regrouped = run.done[-1]["step"]
    run.wait_for("end", lambda: record(run).ended_s is not None)
    assert record(run).state == "stopped"
    assert record(run).exit_code == Preempted.exit_code
    assert [step["step"] for step in run.done] == list(range(1, run.done[-1]["step"] + 1))
    assert run.done[-1]["step"] > regrouped
    assert newest_whole(run.folder / "run" / "checkpoints").checkpoint.step == run.done[-1]["step"]
    assert not run.events("resumed")


def test_a_deputy_that_leads_and_is_killed_is_followed_by_the_next(network: Network, tmp_path: Path) -> None:
    """Nobody starts it anew, and its host is there."""
    run = detached(network, tmp_path / "it")
    head, lost, other = network.hosts
    lose(lost)
    run.wait_for("deputy", lambda: record(run).deputy == other.name)
    (leading,) = deputies(head)
    run.wait_for_step(run.done[-1]["step"] + 5)
    before = replicas(head) + replicas(other)
    leading.kill()
    run.wait_for("the next", lambda: len(run.events("supervisor")) == 2)
    assert record(run).host == other.name
    assert sorted(replicas(head) + replicas(other)) == sorted(before), "a replica was lost"
    hurry(run.folder)
    run.wait_for("end", lambda: record(run).ended_s is not None)
    assert record(run).exit_code == 0
    assert len(run.done[-1]["ranks"]) == 2
    assert not run.events("resumed")
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))


def test_where_the_supervisors_host_loses_its_part_of_ray_the_others_go_on(network: Network, tmp_path: Path) -> None:
    """Ray ends the replica there; the driver has the run go on, and ends it, without."""
    run = detached(network, tmp_path / "it")
    head, lost, other = network.hosts
    before = replicas(head) + replicas(other)
    (raylet,) = [process for process in lost.processes() if process.name() == "raylet"]
    raylet.kill()
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    regrouped = run.done[-1]["step"]
    run.wait_for_step(regrouped + 200)  # longer than Ray takes to count a host as lost
    assert sorted(replicas(head) + replicas(other)) == sorted(before), "a replica was lost"
    hurry(run.folder)
    run.wait_for("end", lambda: record(run).ended_s is not None)
    assert record(run).exit_code == 0
    assert record(run).host == lost.name
    run.wait_for("emptiness", lambda: not replicas(head) + replicas(other) + deputies(head, other))
    assert len(run.done[-1]["ranks"]) == 2
    assert not run.events("resumed")
    assert_nothing_was_lost(run, unharmed(network, tmp_path / "alone"))


def test_a_run_that_a_deputy_took_over_is_stopped_where_it_is_now(network: Network, tmp_path: Path) -> None:
    run = detached(network, tmp_path / "it")
    head, lost, other = network.hosts
    lose(lost)
    run.wait_for("regrouping", lambda: bool(run.events("regroup")))
    elsewhere = other.revdist("stop", run.folder / "run")
    assert elsewhere.returncode == 2
    assert f"on {head.name}: stop it there" in " ".join(elsewhere.text.split())
    stopped = head.revdist("stop", run.folder / "run")
    assert stopped.returncode == 0, stopped.text
    assert record(run).exit_code == Preempted.exit_code
    assert newest_whole(run.folder / "run" / "checkpoints").checkpoint.step == run.done[-1]["step"]
    assert not replicas(head) + replicas(other) + deputies(head, other)


def test_a_driver_on_another_host_finds_the_replicas_that_are_left(network: Network, tmp_path: Path) -> None:
    run = detached(network, tmp_path / "it", orphan_s=60)
    head, lost, other = network.hosts
    before = replicas(head) + replicas(other)
    assert len(before) == 2
    lose(lost, deputies=deputies(head, other))
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
    lose(lost, deputies=deputies(head, other))
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

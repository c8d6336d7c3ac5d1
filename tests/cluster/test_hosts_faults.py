"""Hosts that lose power and links that are cut: the others go on, nothing is lost, and nobody goes on twice."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from hosts import RAY_PORT, REVDIST, Host, Network
from runs import settings
from witness import hurry, notes

from revdist.training.checkpoint import read_state
from revdist.training.checkpoint_files import checkpoints, newest
from revdist.training.run_directory import RunReader

BOUND = 1e-9
"""Largest difference of a weight in fp64 where shares changed on the way: sums in another order."""
BATCH = 10
HEARTBEAT_S = 3
STEPS = 1200
MICRO_BATCHES = [1, 2, 4, 5]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not())),
]


class Run:
    """`revdist launch` on the head of three hosts, under way."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.head = network.hosts[0]
        self.folder = folder
        folder.mkdir()
        self.popen = launch(self.head, folder, "--address", f"{self.head.address}:{RAY_PORT}")

    @property
    def done(self) -> list[Any]:
        """Lines of metrics.jsonl so far."""
        return (
            list(RunReader(self.folder / "run").metrics()) if (self.folder / "run" / "metrics.jsonl").exists() else []
        )

    def events(self, kind: str) -> list[Any]:
        return [event for event in RunReader(self.folder / "run").events() if event["kind"] == kind]

    def notes_of(self, host: Host) -> list[dict[str, Any]]:
        return [note for note in notes(self.folder) if note["host"] == host.name]

    def wait_for(self, what: str, has_come: Callable[[], bool], *, patience_s: float = 90) -> None:
        until_s = time.monotonic() + patience_s
        while not has_come():
            assert self.popen.poll() is None, f"the run ended before {what}:\n{self.output}"
            assert time.monotonic() < until_s, f"no {what} in {patience_s} s:\n{self.output}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(f"step {step}", lambda: bool(self.done) and self.done[-1]["step"] >= step)

    def finish(self, *, patience_s: float = 120) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=patience_s)
        assert self.popen.returncode == 0, self.output

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()


def launch(host: Host, folder: Path, *arguments: str) -> Any:
    values = settings(
        model={"factory": "witness:watched_classifier", "kwargs": {"folder": str(folder)}},
        data={"factory": "witness:images_at_a_pace", "kwargs": {"folder": str(folder), "seconds": 0.1}},
        evaluate=False,
        precision="fp64",
        global_batch=BATCH,
        tensorboard=False,
        devices="auto",
        epochs=None,
        steps=STEPS,
        planning={"profile_repeats": 1, "micro_batches": MICRO_BATCHES},
        checkpoint={"every_steps": 200},
        faults={"heartbeat_s": HEARTBEAT_S},
    )
    (folder / "run.json").write_text(json.dumps(values))
    with (folder / "output").open("w") as output:
        command = [*REVDIST, "launch", str(folder / "run.json"), "--run-dir", str(folder / "run"), *arguments]
        return host.popen(command, stdout=output, stderr=subprocess.STDOUT)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """Three hosts with Ray on them, the head first."""
    with Network(tmp_path) as made:
        head, *others = [made.add() for _ in range(3)]
        head.start_ray()
        for host in others:
            host.start_ray(head)
        yield made


def unharmed(network: Network, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that one host alone comes to."""
    folder.mkdir()
    hurry(folder)
    alone = launch(network.hosts[0], folder)
    assert alone.wait(timeout=120) == 0, (folder / "output").read_text()
    return state_of(folder / "run")


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_state(newest(run_dir / "checkpoints"))


def assert_nothing_was_lost(run: Run, expected: dict[str, torch.Tensor]) -> None:
    assert [step["step"] for step in run.done] == list(range(1, STEPS + 1))
    assert all(sum(rank["share"] for rank in step["ranks"]) == BATCH for step in run.done)
    assert RunReader(run.folder / "run").summary()["replicas_identical"]
    for path in checkpoints(run.folder / "run" / "checkpoints"):
        read_state(path)  # whole, each of them
    final = state_of(run.folder / "run")
    for name, tensor in expected.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=BOUND, msg=name)


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

"""Runs over several hosts to which something happens, and what must be true of them afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

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
EVERY_STEPS = 200
"""Between checkpoints."""
MICRO_BATCHES = [1, 2, 4, 5]


class Run:
    """`revdist launch` on one of several hosts with Ray on them, the head first, under way."""

    def __init__(
        self,
        network: Network,
        folder: Path,
        *arguments: str,
        number: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """number: of the host to launch on."""
        self.head = network.hosts[0]
        self.host = network.hosts[number]
        self.folder = folder
        folder.mkdir()
        address = f"{self.head.address}:{RAY_PORT}"
        self.popen = launch(self.host, folder, "--address", address, *arguments, environment=environment)

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
            assert self.popen.poll() in (None, 0), f"the run ended before {what}:\n{self.output}"
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


def launch(host: Host, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
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
        checkpoint={"every_steps": EVERY_STEPS},
        faults={"heartbeat_s": HEARTBEAT_S},
    )
    (folder / "run.json").write_text(json.dumps(values))
    with (folder / "output").open("w") as output:
        command = [*REVDIST, "launch", str(folder / "run.json"), "--run-dir", str(folder / "run"), *arguments]
        return host.popen(command, stdout=output, stderr=subprocess.STDOUT, environment=environment)


def unharmed(network: Network, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that one host alone comes to."""
    folder.mkdir()
    hurry(folder)
    alone = launch(network.hosts[0], folder)
    assert alone.wait(timeout=120) == 0, (folder / "output").read_text()
    return state_of(folder / "run")


def state_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_state(newest(run_dir / "checkpoints"))


def assert_nothing_was_lost(run: Run, expected: dict[str, torch.Tensor], *, unheard: Collection[int] = ()) -> None:
    """unheard: steps of which a lost supervisor has heard nothing any more."""
    assert [step["step"] for step in run.done] == [step for step in range(1, STEPS + 1) if step not in unheard]
    assert all(sum(rank["share"] for rank in step["ranks"]) == BATCH for step in run.done)
    assert RunReader(run.folder / "run").summary()["replicas_identical"]
    for path in checkpoints(run.folder / "run" / "checkpoints"):
        read_state(path)  # whole, each of them
    final = state_of(run.folder / "run")
    for name, tensor in expected.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=BOUND, msg=name)

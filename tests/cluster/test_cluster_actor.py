"""The process of a replica before and after it trains: who asks for it, and what it does where nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import ray

import revdist
from revdist.cluster.fleet import ORPHAN_S, Fleet, Known, hosts
from revdist.cluster.placement import Place
from revdist.cluster.takeover import end, find
from revdist.config import DeviceSpec

ALONE = """
import time
from revdist.cluster.actor import ReplicaActor
from revdist.cluster.placement import Place
from revdist.config import DeviceSpec
place = Place(rank=0, node_id="", address="127.0.0.1", spec=DeviceSpec(kind="cpu", name="cpu-0", capacity="9MiB"))
actor = ReplicaActor(place, {}, [], 0.4)
for call in (lambda: None, lambda: actor.locate("127.0.0.1"), actor.answer):
    call()
    time.sleep(0.3)
print("was there", flush=True)
time.sleep(60)
"""


def test_one_that_nobody_starts_leaves_once_nobody_asks_for_it(tmp_path: Path) -> None:
    path = str(Path(revdist.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={**os.environ, "PYTHONPATH": path, "REVDIST_DEVICES_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, b"was there\n")


@ray.remote
class Ended:
    """Answers as an actor whose replica has come to its end: at once, whatever it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def reports(self, after: int, timeout_s: float) -> tuple[int, list[Any]]:
        self.calls.append("reports")
        return after + 1, ["its last word"]

    def answer(self) -> None:
        self.calls.append("answer")

    def called(self) -> list[str]:
        return self.calls


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_one_that_has_ended_is_asked_for_nothing_more_and_waits_as_long_as_somebody_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ORPHAN_S, "2")
    actor: Any = Ended.options(num_cpus=0).remote()
    fleet = Fleet((), threads=1, run_id="ended")
    fleet.take_over({0: Known(actor, "")}, next_member=1)
    said = []
    until_s = time.monotonic() + 1.5
    while time.monotonic() < until_s:
        for member, reports in fleet.reports(0.1):
            said.append(reports)
            fleet.dismiss(member)
    assert said == [["its last word"]]
    calls = ray.get(actor.called.remote(), timeout=20)
    assert calls.count("reports") == 1
    assert "answer" in calls[calls.index("reports") :], "it would leave as one that nobody supervises"
    ray.kill(actor)


@pytest.mark.slow
@pytest.mark.usefixtures("devices_folder", "running_ray")
@pytest.mark.parametrize("is_located", [False, True])
def test_one_that_was_not_started_is_ended_by_who_takes_the_run_over(is_located: bool) -> None:
    run_id, (host, *_) = uuid.uuid4().hex[:16], hosts()
    spec = DeviceSpec(kind="cpu", name="cpu-0", capacity="64MiB")
    place = Place(rank=0, node_id=host.node_id, address=host.address, spec=spec)
    left = Fleet([place], threads=1, run_id=run_id)
    if is_located:
        left.locate({0: host.address})
    try:
        assert find(run_id, threads=1, heartbeat_s=5) is None
        assert _is_ended(left.known[0].actor)
    finally:
        end(run_id)


def _is_ended(actor: Any) -> bool:
    """Whether an actor is gone, or is within some time."""
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        try:
            ray.get(actor.answer.remote(), timeout=20)
        except ray.exceptions.RayActorError:
            return True
    return False

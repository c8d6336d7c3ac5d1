"""Runs replicas as processes of this machine, without Ray: what the actors do, with orders given by the test."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revdist.config import RunConfig
from revdist.training.checkpoint_files import newest
from revdist.training.network import listen
from revdist.training.orders import Assignment, Inbox, Rendezvous, Shares
from revdist.training.reports import FailureReport, Outbox, Report, StepReport

TIMEOUT_S = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What replicas left."""

    reports: dict[int, list[Report]]
    checkpoints: Path

    def steps(self) -> list[StepReport]:
        return [report for report in self.reports[0] if isinstance(report, StepReport)]

    def of_kind(self, kind: type[Any]) -> list[Any]:
        return [report for rank in sorted(self.reports) for report in self.reports[rank] if isinstance(report, kind)]

    def state(self) -> dict[str, Any]:
        """The final state, as rank 0 saved it."""
        from revdist.training.checkpoint import read_state

        return read_state(newest(self.checkpoints))


def run_config(**changes: Any) -> RunConfig:
    """A short run of the small classifier; the test names what is different."""
    values: dict[str, Any] = {
        "name": "small",
        "model": {"factory": "small_models:classifier"},
        "data": {"factory": "small_models:images"},
        "optimizer": {"kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}},
        "global_batch": 12,
        "epochs": 2,
        "precision": "fp64",
        "planning": {"profile_repeats": 1, "profile_cache": False},
        "replan": {"every_s": 0.05},
        **changes,
    }
    return RunConfig.from_mapping(values)


def run_replicas(
    configs: Sequence[RunConfig],
    shares: Sequence[Sequence[int]],
    folder: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Train one replica per configuration; `shares` are the generations, published one after another.

    The first generation starts the run and each later one is published once a step has been taken
    under the one before it.
    stop_after: ask the last rank to stop once so many steps are taken
    environment: set in every replica's process
    """
    context = _processes()
    listener = listen("127.0.0.1")
    pipes, processes = [], []
    for rank, config in enumerate(configs):
        ours, theirs = context.Pipe()
        rendezvous = Rendezvous(
            host="127.0.0.1",
            port=listener.getsockname()[1],
            prefix="test",
            rank=rank,
            world_size=len(configs),
            timeout_s=TIMEOUT_S,
        )
        assignment = Assignment(
            config=config,
            rendezvous=rendezvous,
            world_size=len(configs),
            checkpoints=folder / "checkpoints",
            resume=resume,
        )
        process = context.Process(
            target=_live,
            args=(
                assignment,
                listener if rank == 0 else None,
                [tuple(s) for s in shares],
                stop_after,
                dict(environment or {}),
                theirs,
            ),
        )
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        reports = {rank: _receive(pipe) for rank, pipe in enumerate(pipes)}
    finally:
        for process in processes:
            process.kill()
            process.join()
        listener.close()
    return Outcome(reports=reports, checkpoints=folder / "checkpoints")


def assert_no_failure(outcome: Outcome) -> None:
    for report in outcome.of_kind(FailureReport):
        raise AssertionError(f"rank {report.rank}: {report.error}\n{report.error.facts.get('traceback', '')}")


def _processes() -> Any:
    """Processes that start with torch and the planner loaded, which takes seconds, and with nothing running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["revdist.training.replica", "revdist.training.checkpoint", "torch._dynamo"])
    return context


def _receive(pipe: Any) -> list[Report]:
    assert pipe.poll(TIMEOUT_S), "a replica did not answer in time"
    reports: list[Report] = pipe.recv()
    return reports


def _live(
    assignment: Assignment,
    listener: socket.socket | None,
    shares: Sequence[tuple[int, ...]],
    stop_after: int | None,
    environment: Mapping[str, str],
    pipe: Any,
) -> None:
    os.environ.update(environment)
    from revdist.devices import open_device
    from revdist.training.loop import Loop
    from revdist.training.replica import Replica

    assert assignment.rendezvous is not None
    rank = assignment.rendezvous.rank
    device = open_device(kind="cpu", name=f"cpu-{rank}", capacity_bytes=_capacity(assignment.config, rank))
    inbox, outbox = Inbox(), Outbox()
    inbox.adopt(Shares(generation=0, by_rank=shares[0], reason="start"))
    _after_each_step(Loop, inbox, shares, stop_after if rank == len(shares[0]) - 1 else None)
    Replica(assignment, device, inbox, outbox, listener).run()
    pipe.send(outbox.read(0, timeout_s=0)[1])


def _after_each_step(loop: Any, inbox: Inbox, shares: Sequence[tuple[int, ...]], stop_after: int | None) -> None:
    """Publish the next generation, or the stop, when the loop has taken a step: as the controller does in time."""
    take = loop._take_step

    def take_and_order(self: Any) -> Any:
        rows = take(self)
        following = self.shares.generation + 1
        if following < len(shares):
            inbox.adopt(Shares(generation=following, by_rank=shares[following], reason="share"))
        if stop_after is not None and self.step >= stop_after:
            inbox.stop("a test")
        return rows

    loop._take_step = take_and_order


def _capacity(config: RunConfig, rank: int) -> int:
    specs: Mapping[int, Any] = {} if config.devices == "auto" else dict(enumerate(config.devices))
    return (specs[rank].capacity if rank in specs else None) or 256 * 2**20

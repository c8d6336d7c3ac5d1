"""Gradients on their way: what a rank hands in beside them, and the threads that carry it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group_ranks import on_ranks, rendezvous
from torch import nn

from revdist.devices.cpu import CpuDevice
from revdist.reversible import ReversibleChain
from revdist.training.agreement import Agreement
from revdist.training.group import Group
from revdist.training.local_step import LocalStep
from revdist.training.replicated import Replicated
from revdist.training.row import Row


class Half(nn.Module):
    """Uses one of its layers, so that the other's gradient has to be made up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def step(rank: int, replicated: Replicated, batch: Any, then: Callable[[], object] = lambda: None) -> list[Row]:
    """The rows of one step. then: called when this rank has handed its row in."""
    agreements = []

    def hand_in() -> None:
        agreements.append(Agreement(Row(samples=rank + 1, loss_sum=replicated.loss_sum), dist.group.WORLD))
        then()

    replicated.start_step(hand_in)
    replicated.backward(batch, 2.0, reduce=True)
    rows = agreements[0].rows()
    replicated.model(torch.ones(2, 3)).sum().backward()  # as a profile is measured between steps
    assert len(agreements) == 1
    return rows


@pytest.mark.parametrize("has_samples", [True, False])
def test_a_rank_hands_its_row_in_while_a_peer_has_not_begun_its_backward(has_samples: bool, tmp_path: Path) -> None:
    """The peer begins once it has seen that: were the row to wait for the reduction, nobody would ever go on."""
    batch = (torch.ones(2, 3), torch.zeros(2, dtype=torch.long))

    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 2, ports[0]))
        replicated = Replicated(Half(), nn.functional.cross_entropy, "fp32")
        step(rank, replicated, batch)  # at the first, DDP lays out its buckets with the other ranks
        if rank == 0:
            own = batch if has_samples else None
            return step(rank, replicated, own, then=lambda: handed_in.write_text("now"))
        handed_in.read_text()
        return step(rank, replicated, batch)

    handed_in = tmp_path / "handed-in"
    os.mkfifo(handed_in)
    first, second = on_ranks(2, work)
    assert first == second
    assert [row.samples for row in first] == [1, 2]
    assert (first[0].loss_sum > 0) == has_samples
    assert first[1].loss_sum > 0


class Branching(nn.Module):
    """Two streams, of which one's backward runs out of memory once while the other's has yet to come."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.num_failures = 1
        self.chain = ReversibleChain([nn.Linear(64, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.first(x).exp().exp()
        second: torch.Tensor = self.second(x)  # the younger node: its backward comes first
        second.register_hook(self._fail)
        out: torch.Tensor = self.chain(first + second)
        return out

    def _fail(self, _: torch.Tensor) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("no room")


def test_nothing_of_an_attempt_that_ran_out_of_memory_is_left_when_a_smaller_plan_is_made(devices_folder: Path) -> None:
    samples = [(torch.full((64,), number / 1000), number % 3) for number in range(256)]

    def work(rank: int, group: Group, ports: list[int]) -> Any:
        device = CpuDevice.open("cpu-0", capacity_bytes=2**26)
        device.activate()
        group.join(rendezvous(rank, 1, ports[0]))
        model = Branching()
        replicated = Replicated(model, nn.functional.cross_entropy, "fp32")
        local = LocalStep(replicated, model.chain, device, precision="fp32", seed=0)
        allocated = []

        def smaller_plan(shortage: str) -> int:
            allocated.append(device.meter().allocated_bytes())
            return 128

        allocated.append(device.meter().allocated_bytes())
        local.run(
            samples, np.arange(256), step=1, rank=rank, scale=1.0, micro_batch=256, smaller_plan=smaller_plan,
            on_their_way=lambda _: None,
        )  # fmt: skip
        device.deactivate()
        return allocated

    ((before, short),) = on_ranks(1, work)
    assert short - before < 1024, "a batch takes 64 KiB"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are batch threads on Linux alone")
def test_threads_that_wait_on_sockets_do_not_take_the_core_from_those_that_send() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 2, ports[0]))
        dist.barrier()
        tasks = [(task / "comm", int(task.name)) for task in Path("/proc/self/task").iterdir()]
        policies = [os.sched_getscheduler(number) for name, number in tasks if "tcp_loop" in name.read_text()]
        own = os.sched_getscheduler(0)
        dist.barrier()
        return policies, own

    for policies, own in on_ranks(2, work):
        assert policies
        assert set(policies) == {os.SCHED_BATCH}
        assert own == os.SCHED_OTHER

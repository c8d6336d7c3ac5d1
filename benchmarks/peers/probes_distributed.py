"""Probes under DistributedDataParallel, with gloo."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.behaviour import CHANNELS, Answer, Probe, Trial, Verdict, compare, image
from benchmarks.peers.networks import smooth_branch
from benchmarks.peers.probes_gradients import normalized

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=10)
"""After which a rank that waits for a collective that the other never starts gives up."""


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A process group of one: what DDP does to autograd needs no second rank."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _under_ddp(trial: Trial, **options: Any) -> Verdict:
    """Two steps, since the first one of a static graph is another one."""
    reference, network = trial.pair(normalized)
    with _alone():
        wrapped = DistributedDataParallel(network, **options)
        for _ in range(2):
            reference.zero_grad()
            wrapped.zero_grad()
            reference(image()).square().mean().backward()
            wrapped(image()).square().mean().backward()
    return compare(network.body_gradients(), reference.body_gradients())


def default_mode(trial: Trial) -> Verdict:
    return _under_ddp(trial)


def unused_parameters(trial: Trial) -> Verdict:
    return _under_ddp(trial, find_unused_parameters=True)


def static_graph(trial: Trial) -> Verdict:
    return _under_ddp(trial, static_graph=True)


def accumulation(trial: Trial) -> Verdict:
    reference, network = trial.pair(normalized)
    with _alone():
        wrapped = DistributedDataParallel(network)
        with wrapped.no_sync():
            wrapped(image()).square().mean().backward()
        wrapped(2.0 * image()).square().mean().backward()
    for factor in (1.0, 2.0):
        reference(factor * image()).square().mean().backward()
    return compare(network.body_gradients(), reference.body_gradients())


class _Centred(torch.autograd.Function):
    """x less its mean over all ranks: one collective in the forward and one in the backward, as SyncBatchNorm has."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor) -> Tensor:
        return x_BCHW - _mean_over_ranks(x_BCHW)[:, None, None]

    @staticmethod
    def backward(ctx: Any, grad_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        return grad_BCHW - _mean_over_ranks(grad_BCHW)[:, None, None]


class _CentredOverRanks(nn.Module):
    """A branch that talks to the other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = smooth_branch(CHANNELS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.branch(_Centred.apply(x_BCHW))
        return y_BCHW


def _mean_over_ranks(x_BCHW: Tensor) -> Tensor:
    mean_C = x_BCHW.detach().mean(dim=(0, 2, 3))
    dist.all_reduce(mean_C)
    return mean_C / dist.get_world_size()


def _on_two_ranks(step: Callable[[int], Verdict]) -> Verdict:
    """The verdict of rank 0; the other rank is forked from here."""

    def run(rank: int) -> Verdict:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=COLLECTIVE_TIMEOUT
        )
        verdict = step(rank)
        dist.barrier()
        dist.destroy_process_group()
        return verdict

    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        other = multiprocessing.get_context("fork").Process(target=run, args=(1,))
        other.start()
        verdict = run(0)
        other.join()
        return verdict


def _collective(trial: Trial, *, plain_rank: int | None) -> Verdict:
    """Compare rank 0's gradients with those of plain autograd on both ranks; `plain_rank` uses that in any case."""

    def step(rank: int) -> Verdict:
        reference, network = trial.pair(_CentredOverRanks)
        for net in (reference, reference if rank == plain_rank else network):
            # Many small buckets: they are on their way while branches communicate.
            wrapped = DistributedDataParallel(net, bucket_cap_mb=0.001)
            for _ in range(2):
                net.zero_grad()
                wrapped((rank + 1.0) * image()).square().mean().backward()
            del wrapped
        return compare(network.body_gradients(), reference.body_gradients()) if rank == 0 else Verdict(Answer.YES)

    return _on_two_ranks(step)


def collective_in_branch(trial: Trial) -> Verdict:
    return _collective(trial, plain_rank=None)


def collective_on_one_side(trial: Trial) -> Verdict:
    return _collective(trial, plain_rank=1)


PROBES = (
    Probe("ddp", "DDP", default_mode),
    Probe("ddp-find-unused", "DDP, find_unused_parameters=True", unused_parameters),
    Probe("ddp-static-graph", "DDP, static_graph=True", static_graph),
    Probe("ddp-no-sync", "DDP, accumulation under no_sync", accumulation),
    Probe("collective", "A collective inside a branch", collective_in_branch),
    Probe("collective-one-side", "The same, the other rank keeping everything", collective_on_one_side),
)

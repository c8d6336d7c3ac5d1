"""Two claims beside time and memory: what demotion frees, and how early gradients can be reduced."""

import dataclasses
import gc
import os
import time

import torch
import torch.distributed as dist  # no postponed annotations here: DDP compares a hook's with the real types
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.bodies import Subject
from benchmarks.peers.cost import CHANNELS, batch, loss_of
from benchmarks.peers.networks import convolution_branch, couplings
from revdist.devices import MemoryMeter
from revdist.reversible import AdditiveCoupling, ReversibleChain

LATE = 0.8
"""A gradient bucket launched after this part of the backward hides little of its reduction."""

BUCKET_CAP_MB = 0.1
"""So small that the network, which has 73 KiB of parameters a branch, has many buckets."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demotion:
    """What `ReversibleChain.demote` said it released and what the allocator got back, each asked in one step."""

    asked_bytes: int
    said_bytes: int
    freed_bytes: int


def measure_demotion(depth: int, meter: MemoryMeter, parts: tuple[float, ...] = (0.1, 0.5, 0.9)) -> list[Demotion]:
    """Between forward and backward, ask an all-SAVE chain for parts of what it holds."""
    chain = ReversibleChain([AdditiveCoupling(f, g) for f, g in _network(depth)])
    chain.set_schedule(["SAVE"] * chain.num_operators)
    demotions = []
    for part in parts:
        gc.collect()
        before_bytes = meter.allocated_bytes()
        loss = loss_of(chain(batch()))
        held_bytes = meter.allocated_bytes()
        asked_bytes = int(part * (held_bytes - before_bytes))
        said_bytes = chain.demote(asked_bytes)
        freed_bytes = held_bytes - meter.allocated_bytes()
        loss.backward()
        demotions.append(Demotion(asked_bytes=asked_bytes, said_bytes=said_bytes, freed_bytes=freed_bytes))
    return demotions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """When DDP could start to reduce each bucket of gradients, as a part of the backward, in order."""

    launched: tuple[float, ...]

    @property
    def num_early(self) -> int:
        return sum(part < LATE for part in self.launched)


def measure_buckets(subject: Subject, depth: int) -> Buckets:
    """One step under DDP. Call it in a process of its own: it starts a process group.

    The group has one rank, which is enough to see when buckets become ready.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(subject.build(_network(depth)), bucket_cap_mb=BUCKET_CAP_MB)
    launched_s: list[float] = []

    def launch(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        launched_s.append(time.process_time())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, launch)
    for _ in range(3):  # buckets follow the order of the gradients from the second step on
        model.zero_grad()
        loss = loss_of(model(batch().requires_grad_()))
        launched_s.clear()
        started_s = time.process_time()
        loss.backward()
        backward_s = time.process_time() - started_s
    return Buckets(launched=tuple((moment_s - started_s) / backward_s for moment_s in launched_s))


def _network(depth: int) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    return list(couplings(lambda: convolution_branch(CHANNELS), depth))

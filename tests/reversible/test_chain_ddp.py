"""Chains under DistributedDataParallel, and collectives inside branches, with schedules that differ by rank."""

from __future__ import annotations

import contextlib
import copy
import datetime

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from reversible_models import INVERT, assert_close, conv_chain, gradients, schedules, uniform
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from revdist.errors import ReplayDiverged
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain, find_chain

IMAGES = (4, 3, 8, 8)


def batches():
    torch.manual_seed(7)
    return torch.randn(2, *IMAGES, dtype=torch.float64)


def chain_without_statistics():
    torch.manual_seed(0)
    return conv_chain(1).eval()  # BatchNorm over a part of the batch is not that over all


def train_under_ddp(rank):
    """Gradients under each of DDP's ways to work."""
    results = {}
    for name, options in {
        "default": {},
        "find_unused_parameters": {"find_unused_parameters": True},
        "static_graph": {"static_graph": True},
        "bucket views": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    }.items():
        chain = chain_without_statistics()
        model = DistributedDataParallel(chain, **options)
        mine = schedules(chain)
        for step in range(3):
            find_chain(model).set_schedule(mine[(3 * rank + step) % len(mine)])
            model.zero_grad()
            model(batches()[rank]).square().mean().backward()
        results[name] = gradients(chain)
    chain = chain_without_statistics()
    model = DistributedDataParallel(chain)
    chain.set_schedule(uniform(chain, *INVERT) if rank else uniform(chain, Mode.SAVE))
    for part, half in enumerate(batches()[rank].chunk(2)):
        with model.no_sync() if part == 0 else contextlib.nullcontext():
            (model(half).square().mean() / 2).backward()
    results["no_sync"] = gradients(chain)
    return results


class GlobalNorm(nn.Module):
    """Normalises with statistics over all ranks; differentiates through them as SyncBatchNorm does."""

    def __init__(self, channels, asynchronous=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.asynchronous = asynchronous

    def forward(self, x):
        mean, variance = _Moments.apply(x, self.asynchronous)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, asynchronous):
        sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])
        if asynchronous:
            dist.all_reduce(sums, async_op=True).wait()
        else:
            gathered = torch.empty(dist.get_world_size() * 3, *sums.shape[1:], dtype=x.dtype)
            dist.all_gather_into_tensor(gathered, sums)
            sums = gathered.view(-1, *sums.shape).sum(0)
        mean, square = sums[:2] / sums[2]
        ctx.save_for_backward(x, sums[2])
        return mean, square - mean.square()

    @staticmethod
    def backward(ctx, grad_mean, grad_variance):
        x, count = ctx.saved_tensors
        # d variance / d x also passes through the mean; both derivatives are summed over ranks first
        sums = torch.stack([grad_mean, grad_variance])
        dist.all_reduce(sums)
        mean = x.mean(0)
        total = mean.clone()
        dist.all_reduce(total)
        mean = total / dist.get_world_size()
        return (sums[0] + 2 * sums[1] * (x - mean)) / count, None


def normalised_chain(num_blocks=3):
    torch.manual_seed(0)

    def branch(asynchronous):
        return nn.Sequential(nn.Linear(4, 4), GlobalNorm(4, asynchronous), nn.Tanh(), nn.Linear(4, 4))

    return ReversibleChain([AdditiveCoupling(branch(False), branch(True)) for _ in range(num_blocks)]).double()


def train_with_collectives(rank):
    """Gradients of several steps with schedules that differ by rank, and those of saving everything."""
    torch.manual_seed(rank)
    x = torch.randn(5, 8, dtype=torch.float64)
    chain = normalised_chain()
    reference = copy.deepcopy(chain)
    results = []
    for step in range(4):
        for model in (chain, reference):
            model.zero_grad()
        if step:
            modes = [Mode.INVERT if (i + step) % (rank + 2) else Mode.SAVE for i in range(chain.num_operators)]
            chain.set_schedule(modes)
        loss = chain(x).square().mean()
        if step == 3 and rank == 0:
            chain.demote(2**30)
        loss.backward()
        reference(x).square().mean().backward()
        results.append((gradients(chain), gradients(reference)))
    buffers = [list(model.buffers()) for model in (chain, reference)]
    return results, buffers


@pytest.mark.slow
def test_ddp_gives_the_gradients_of_the_whole_batch_whatever_each_ranks_schedule(tmp_path):
    chain = chain_without_statistics()
    sum(chain(x).square().mean() / 2 for x in batches()).backward()
    expected = gradients(chain)
    for results in run_on_ranks(train_under_ddp, tmp_path):
        assert len(results) == 5
        for name, actual in results.items():
            assert len(actual) == len(expected), name
            assert_close(actual, expected)


@pytest.mark.slow
def test_collectives_inside_branches_run_once_and_need_no_common_schedule(tmp_path):
    for results, (buffers, reference_buffers) in run_on_ranks(train_with_collectives, tmp_path):
        for actual, expected in results:
            assert_close(actual, expected)
        assert_close(buffers, reference_buffers)


@pytest.fixture
def lone_group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=20),
    )
    yield
    dist.destroy_process_group()


class Talks(nn.Module):
    """Calls a collective in its forward, unless told otherwise."""

    def __init__(self, call):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.call = call
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return self.call(torch.tanh(self.linear(x)), self.num_calls)


def all_reduce_then_edit(x, _):
    statistics = x.detach().mean(0)
    dist.all_reduce(statistics)
    return x * statistics.mul_(2)


def functional(x, _):
    import torch.distributed._functional_collectives as functional_collectives

    return x * functional_collectives.all_reduce(x.detach().mean(0), "sum", dist.group.WORLD)


def barrier_and_gather(x, _):
    dist.barrier()
    gathered = [torch.empty_like(x)]
    dist.all_gather(gathered, x.detach())
    return x * gathered[0].mean()


@pytest.mark.parametrize("call", [all_reduce_then_edit, functional, barrier_and_gather])
def test_each_kind_of_collective_is_repeated_from_the_forward(call, lone_group):
    torch.manual_seed(0)
    chain = ReversibleChain([AdditiveCoupling(Talks(call), Talks(call)) for _ in range(2)]).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    chain(x).square().sum().backward()
    expected = gradients(chain)
    chain.set_schedule(uniform(chain, *INVERT))
    for _ in range(2):
        chain.zero_grad()
        chain(x).square().sum().backward()
        assert_close(gradients(chain), expected)


def test_other_collectives_in_the_replay_are_refused(lone_group):
    def once_all_reduce_then_broadcast(x, num_calls):
        statistics = x.detach().mean(0)
        dist.all_reduce(statistics) if num_calls == 1 else dist.broadcast(statistics, 0)
        return x * statistics

    talking = Talks(once_all_reduce_then_broadcast)
    chain = ReversibleChain([AdditiveCoupling(talking, nn.Linear(3, 3))])
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(torch.randn(2, 6)).sum()
    with pytest.raises(ReplayDiverged, match="broadcast_"):
        loss.backward()

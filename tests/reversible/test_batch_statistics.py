"""A replay normalises with the batch statistics that its forward took."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from reversible_models import INVERT, assert_close, gradients, schedules, step, twins, uniform
from torch import nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain
from revdist.reversible.statistics import BatchStatistics

GRID = 2.0**-12


def branch(norm, width=4):
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), norm(width), nn.SiLU(), norm(width))


def chain_of(norm, *, num_blocks=2, grid=None):
    torch.manual_seed(0)
    return ReversibleChain([AdditiveCoupling(branch(norm), branch(norm), grid=grid) for _ in range(num_blocks)])


def layouts(x):
    yield x
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield x.to(memory_format=torch.channels_last_3d)
    yield x.repeat_interleave(2, dim=-1)[..., ::2]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)


def run_and_watch(norm, x, watch):
    """The norm's result, and what it saves beside parameters and buffers."""
    own = {id(tensor) for tensor in (*norm.parameters(), *norm.buffers())}
    saved = []

    def pack(tensor):
        watch(tensor, owned=id(tensor) in own)
        if id(tensor) not in own:
            saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return norm(x), saved


@pytest.mark.parametrize("shape", [(64, 7), (3, 4, 6), (2, 17, 3, 3), (8, 32, 8, 8), (2, 3, 1, 1), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("types", ["fp32", "fp64", "bf16 input"])
@pytest.mark.parametrize("affine", [True, False])
def test_the_same_bits_come_out_and_are_saved_in_any_layout(shape, types, affine):
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = kind(shape[1], affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = 30 * torch.randn(shape) + 7
    if types == "fp64":
        norm, x = norm.double(), x.double()
    elif types == "bf16 input":
        x = x.bfloat16()
    for laid_out in layouts(x):
        laid_out = laid_out.detach().requires_grad_()
        statistics = BatchStatistics([norm])
        y, saved = run_and_watch(norm, laid_out, statistics.notice)
        again = []
        with statistics.given(lambda tensor, again=again: again.append(tensor.detach())):
            repeated, otherwise_saved = run_and_watch(norm, laid_out, lambda *_, **__: None)
        assert torch.equal(y, repeated)
        assert y.stride() == repeated.stride()
        assert not (again and otherwise_saved)
        assert all(torch.equal(one, other) for one, other in zip(saved, again + otherwise_saved, strict=True))
        assert list(statistics.tensors())
        assert "forward" not in norm.__dict__


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class OnTheWeights(nn.BatchNorm2d):
    """Somebody else's way to use the norm's tensors."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)


class ByHand(nn.Module):
    """Updates a norm's buffers without calling it."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, True, 0.1)


class Twice(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(torch.tanh(self.norm(x)) + x)


def evaluating(width):
    return nn.BatchNorm2d(width).eval()


def normed_weight(width):
    return nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(width), "weight", dim=0)


class ComputedWeight(nn.Module):
    """Gives its norm a weight that is no parameter."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.norm = nn.BatchNorm2d(width)
        del self.norm.weight

    def forward(self, x):
        self.norm.__dict__["weight"] = torch.exp(self.scale)
        try:
            return self.norm(x)
        finally:
            del self.norm.__dict__["weight"]


def frozen(width):
    return nn.BatchNorm2d(width).requires_grad_(False)


NORMS = {
    "default": nn.BatchNorm2d,
    "no momentum": lambda width: nn.BatchNorm2d(width, momentum=None),
    "no running statistics": lambda width: nn.BatchNorm2d(width, track_running_stats=False),
    "not affine": lambda width: nn.BatchNorm2d(width, affine=False),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "evaluating": evaluating,
    "frozen": frozen,
    "weight_norm": normed_weight,
    "computed weight": ComputedWeight,
    "subclass": Subclass,
    "functional": OnTheWeights,
    "by hand": ByHand,
    "twice": Twice,
}


@pytest.mark.parametrize("norm", NORMS)
def test_every_kind_of_norm_has_the_gradients_and_buffers_of_plain_autograd(norm):
    chain = chain_of(NORMS[norm]).double()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    for schedule in schedules(chain, num_random=2):
        mine, plain = twins(chain)
        mine.set_schedule(schedule)
        for _ in range(2):
            assert_close(step(mine, x), step(plain, x))
        for one, other in zip(mine.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["default", "no momentum", "twice", "no running statistics", "not affine"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("layout", range(4))
def test_exact_couplings_stay_exact_in_any_layout(norm, autocast, layout):
    chain = chain_of(NORMS[norm], grid=GRID)
    x = list(layouts(torch.randn(3, 8, 5, 5)))[layout]
    found = []
    for mode in (Mode.SAVE, Mode.INVERT):
        mine = copy.deepcopy(chain)
        mine.set_schedule(uniform(mine, mode))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = mine(x).square().sum()
        loss.backward()
        found.append(gradients(mine))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("demoted", [False, True])
def test_taking_statistics_is_not_repeated(monkeypatch, demoted):
    chain = chain_of(nn.BatchNorm2d)
    if not demoted:
        chain.set_schedule(uniform(chain, *INVERT))
    training = []
    batch_norm = F.batch_norm

    def counted(*args, **kwargs):
        training.append(kwargs["training"] if "training" in kwargs else args[5])
        return batch_norm(*args, **kwargs)

    monkeypatch.setattr(F, "batch_norm", counted)
    loss = chain(torch.randn(3, 8, 5, 5)).sum()
    num_norms = 8
    assert training == [True] * num_norms
    if demoted:
        assert chain.demote(2**60) > 0
    loss.backward()
    assert training[num_norms:] == [False] * num_norms


def test_a_norm_is_itself_again_when_a_replay_fails():
    chain = chain_of(nn.BatchNorm2d)
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(torch.randn(3, 8, 5, 5)).sum()

    def fail(*_):
        raise RuntimeError("mid-replay")

    hook = chain.get_submodule("1.g.2").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mid-replay"):
        loss.backward()
    hook.remove()
    assert not any("forward" in module.__dict__ for module in chain.modules())


@pytest.mark.parametrize("demoted", [False, True])
@pytest.mark.parametrize("schedule", range(4))
def test_backward_thrice_and_double_backward(schedule, demoted):
    chain, plain = twins(chain_of(nn.BatchNorm2d).double())
    chain.set_schedule(schedules(chain)[schedule])
    for model in (chain, plain):
        x = torch.linspace(-2, 2, 3 * 8 * 25, dtype=torch.float64).view(3, 8, 5, 5).sin().requires_grad_()
        loss = model(x).square().sum()
        if demoted and model is chain:
            chain.demote(2**60)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_what_a_replay_does_itself_is_not_compiled():
    """`compile` of a Sequential of torch's modules compiles nothing in the forward, so nothing may be in a replay."""
    graphs = []

    def compile_(graph, _):
        graphs.append(graph)
        return graph.forward

    chain, plain = twins(chain_of(nn.BatchNorm2d))
    for coupling in chain.children():
        coupling.f.compile(backend=compile_)
    x = torch.randn(3, 8, 5, 5)
    for schedule in itertools.islice(schedules(chain), 3):
        chain.set_schedule(schedule)
        assert_close(step(chain, x), step(plain, x), 1e-5)
    assert not graphs


@pytest.mark.slow
@pytest.mark.parametrize("whole_branch", [True, False])
def test_compiled_norms_are_not_compiled_again_in_every_step(whole_branch):
    chain, plain = twins(chain_of(nn.BatchNorm2d))
    for coupling in chain.children():
        if whole_branch:
            coupling.f.compile(backend="aot_eager")
        else:
            coupling.f[2].compile(backend="aot_eager")
            coupling.g[1] = torch.compile(coupling.g[1], backend="aot_eager")
    x = torch.randn(3, 8, 5, 5)
    for number, schedule in enumerate(itertools.islice(schedules(chain), 3)):
        chain.set_schedule(schedule)
        assert_close(step(chain, x), step(plain, x), 1e-5)
        if number == 1:
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["recompiles"]

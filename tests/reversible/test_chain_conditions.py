"""A replay runs under the conditions of the forward and leaves nothing changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from reversible_models import (
    IMAGES,
    INVERT,
    Plain,
    assert_close,
    branches,
    conv_chain,
    gradients,
    images,
    linear_chain,
    schedules,
    step,
    twins,
    uniform,
)
from torch import nn

from revdist.errors import ReplayDiverged
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, InvertibleConv2d, ReversibleChain


def test_dropout_masks_are_those_of_the_forward_and_the_random_stream_goes_on_undisturbed():
    torch.manual_seed(0)
    chain = conv_chain(dropout=0.5)
    x = images()
    results = []
    for schedule in schedules(chain):
        chain.set_schedule(schedule)
        results.append([*step(chain, x), torch.get_rng_state().double()])
    for result in results[1:]:
        assert_close(result, results[0])


def test_batch_norm_statistics_move_once_a_step(modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain())
    chain.set_schedule(uniform(chain, *modes))
    x = images()
    step(chain, x)
    step(plain, x)
    for one, other in zip(chain.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert all(int(module.num_batches_tracked) == 1 for module in chain.modules() if isinstance(module, nn.BatchNorm2d))


class PowerIteration(nn.Module):
    """Divides by an estimate of its weight's norm that each forward improves in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.register_buffer("direction", torch.randn(width))
        self.register_buffer("mask", torch.ones(width))

    def forward(self, x):
        with torch.no_grad():
            self.direction.copy_(nn.functional.normalize(self.weight @ self.direction, dim=0))
        return x @ (self.weight / (self.weight @ self.direction).norm()) * self.mask


@pytest.mark.parametrize("num_steps", [1, 3])
def test_buffers_that_the_forward_writes_start_the_replay_as_they_started_the_forward(num_steps):
    torch.manual_seed(0)
    chain, plain = twins(
        ReversibleChain([AdditiveCoupling(PowerIteration(3), PowerIteration(3)) for _ in range(3)]).double()
    )
    chain.set_schedule(uniform(chain, *INVERT))
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(num_steps):
        assert_close(step(chain, x), step(plain, x))
    for one, other in zip(chain.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


def test_spectral_norm():
    torch.manual_seed(0)

    def branch():
        return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

    chain, plain = twins(ReversibleChain([AdditiveCoupling(branch(), branch()) for _ in range(2)]).double())
    chain.set_schedule(uniform(chain, *INVERT))
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(2):
        assert_close(step(chain, x), step(plain, x))


@pytest.mark.parametrize("inside_backward", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_autocast_is_replayed(inside_backward, seed):
    """On a grid a replay has the bits of the forward, which it has under the same autocast only."""
    torch.manual_seed(seed)
    elements = {"stem": nn.Conv2d(3, 8, 3), "narrow0": AdditiveCoupling(*branches(4), grid=2**-12)}
    chain, plain = twins(ReversibleChain(elements | {"head": nn.Conv2d(8, 2, 3)}))
    x = torch.randn(IMAGES)
    dtypes = []
    for name in ("stem", "narrow0.f", "narrow0.g"):
        chain.get_submodule(name).register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    for schedule in (uniform(chain, Mode.SAVE), uniform(chain, *INVERT)):
        chain.set_schedule(schedule)
        for model in (chain, plain):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).square().sum()
                if inside_backward:
                    loss.backward()
            if not inside_backward:
                loss.backward()
        for one, other in zip(gradients(chain), gradients(plain), strict=True):
            assert torch.equal(one, other)
    assert set(dtypes) == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


class MovingMean(nn.Module):
    """Subtracts a mean that each forward replaces by another tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.tanh((x - self.mean) * (1 + self.mean.square()))


@pytest.mark.parametrize("demoted", [False, True])
def test_buffers_that_the_forward_replaces(demoted):
    torch.manual_seed(0)

    def branch():
        return nn.Sequential(MovingMean(3), nn.Linear(3, 3), MovingMean(3))

    chain, plain = twins(ReversibleChain([AdditiveCoupling(branch(), branch()) for _ in range(2)]).double())
    chain.set_schedule(uniform(chain, *((Mode.SAVE,) if demoted else INVERT)))
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(3):
        loss = chain(x).square().sum()
        if demoted:
            chain.demote(10**9)
        loss.backward()
        plain(x).square().sum().backward()
        assert_close(gradients(chain), gradients(plain))
    for one, other in zip(chain.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen_before", [False, True])
@pytest.mark.parametrize("name", ["0", "1.f"])
def test_freezing_between_forward_and_backward(name, frozen_before, modes):
    """A frozen layer saves less: not what its backward needs, but as many tensors or more when run again unfrozen."""
    torch.manual_seed(0)

    def layers(width):
        return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    chain = ReversibleChain([layers(6), AdditiveCoupling(layers(3), layers(3))]).double()
    chain.set_schedule(uniform(chain, *modes))
    plain = Plain(copy.deepcopy(chain))
    values, found = torch.randn(4, 6, dtype=torch.float64), []
    for model, module in ((chain, chain.get_submodule(name)), (plain, plain.elements.get_submodule(name))):
        for _ in range(2):
            x = values.clone().requires_grad_()
            module.requires_grad_(not frozen_before)
            loss = model(x).square().sum()
            chain.demote(10**9)
            module.requires_grad_(frozen_before)
            loss.backward()
        assert all(parameter.requires_grad is frozen_before for parameter in module.parameters())
        found.append([x.grad, *gradients(model)])
    assert_close(*found)


def test_parameters_that_are_exchanged_after_the_forward():
    """By functional_call for one call, and by load_state_dict for good: gradients go to those that took part."""
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1))
    chain.set_schedule(uniform(chain, *INVERT))
    values = {name: 0.5 * value.detach() for name, value in chain.named_parameters()}
    x, found = images(), []
    for model, prefixed in ((chain, list(values)), (plain, [name for name, _ in plain.named_parameters()])):
        given = [value.clone().requires_grad_() for value in values.values()]
        output = torch.func.functional_call(model, dict(zip(prefixed, given, strict=True)), (x,))
        own, latest = list(model.parameters()), model(x)
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        (output + latest).square().sum().backward()
        found.append([parameter.grad for parameter in (*given, *own)])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert_close(*found)


def test_training_flags_are_those_of_the_forward():
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1))
    chain.set_schedule(uniform(chain, *INVERT))
    x = images()
    for model in (chain, plain):
        loss = model(x).square().sum()
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
    assert_close(gradients(chain), gradients(plain))


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_memory_layouts(layout, modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1))
    chain.set_schedule(uniform(chain, *modes))
    x = images()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(3, 6, 8, 16, dtype=torch.float64)[:, ::2, :, ::2]
    else:
        x = x[:1].expand(3, -1, -1, -1)
    chain(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
@pytest.mark.parametrize("demoted", [False, True])
def test_masks_are_those_of_the_forward_where_an_inverse_returns_another_layout(demoted, layout):
    """The circular convolution inverts through frequencies, which come back with other strides."""
    torch.manual_seed(0)

    def branch():
        return nn.Sequential(nn.Dropout(0.5), nn.Conv2d(2, 2, 1))

    chain = ReversibleChain([AdditiveCoupling(branch(), branch()), InvertibleConv2d(4)]).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    if layout == "expanded":
        x = x[:1].expand(2, -1, -1, -1)
    expected = step(chain, x)
    chain.set_schedule(uniform(chain, Mode.SAVE if demoted else Mode.INVERT))
    torch.manual_seed(3)
    x.requires_grad_()
    chain.zero_grad()
    loss = chain(x).square().sum()
    assert (chain.demote(10**9) > 0) == demoted
    loss.backward()
    assert_close([loss.detach(), x.grad, *gradients(chain)], expected)


def test_what_draws_runs_again_on_the_layout_of_its_forward():
    """Halves at the end of a run are parts of one tensor; a GPU draws for such in another order."""
    layouts = []
    branch = nn.Sequential(nn.Dropout(0.5), nn.Hardtanh())
    branch[0].register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].stride()))
    chain = ReversibleChain([AdditiveCoupling(nn.Identity(), branch)])
    chain.set_schedule(uniform(chain, Mode.INVERT))
    chain(torch.randn(2, 4, 3, 3, requires_grad=True)).square().sum().backward()
    assert len(layouts) == 2
    assert len(set(layouts)) == 1


def test_no_grad_and_eval(modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1))
    chain.set_schedule(uniform(chain, *modes))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(chain(x), plain(x))
    with torch.inference_mode():
        torch.testing.assert_close(chain.eval()(x), plain.eval()(x))
    assert_close(step(chain, x), step(plain, x))


def test_an_exception_in_the_forward_leaves_the_chain_usable(modes):
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1, dropout=0.2))
    chain.set_schedule(uniform(chain, *modes))
    with pytest.raises(RuntimeError, match="mid-step"), _failing(chain, on_call=1):
        chain(images())
    x = images()
    for one, other in zip(plain.buffers(), chain.buffers(), strict=True):
        one.copy_(other)
    assert_close(step(chain, x), step(plain, x))


def test_an_exception_in_a_replay_restores_what_it_changed_and_leaves_the_chain_usable():
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1, dropout=0.2))
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(images()).sum()
    buffers = [buffer.clone() for buffer in chain.buffers()]
    chain.eval()
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mid-step"), _failing(chain, on_call=1):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(chain.buffers(), buffers, strict=True))
    assert not any(module.training for module in chain.modules())
    chain.train()
    x = images()
    for one, other in zip(plain.buffers(), chain.buffers(), strict=True):
        one.copy_(other)
    assert_close(step(chain, x), step(plain, x))


class _failing:  # noqa: N801
    """Makes a layer in the middle of a branch raise."""

    def __init__(self, chain: nn.Module, on_call: int) -> None:
        self.layer = chain.get_submodule("narrow0.f.6")
        self.on_call = on_call

    def __enter__(self):
        def fail(*_):
            raise RuntimeError("mid-step")

        self.hook = self.layer.register_forward_pre_hook(fail)

    def __exit__(self, *_):
        self.hook.remove()


def test_an_operator_that_saves_other_tensors_when_run_again_is_refused():
    class Fickle(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.sin() if self.calls == 1 else x.sigmoid().sin()

    chain = ReversibleChain([AdditiveCoupling(Fickle(), nn.Linear(3, 3)), AdditiveCoupling(Fickle(), nn.Linear(3, 3))])
    chain.set_schedule(uniform(chain, *INVERT))
    loss = chain(torch.randn(2, 6, requires_grad=True)).sum()
    with pytest.raises(ReplayDiverged, match=r"operator 1\.f saved 1 tensors"):
        loss.backward()


def test_deepcopy_and_pickle_in_the_middle_of_a_step(modes):
    torch.manual_seed(0)
    chain = conv_chain(1)
    chain.set_schedule(uniform(chain, *modes))
    x = images()
    loss = chain(x).square().sum()
    copied = copy.deepcopy(chain)
    pickled = pickle.loads(pickle.dumps(chain))
    loss.backward()
    expected = gradients(chain)
    for other in (copied, pickled):
        assert other.schedule == chain.schedule
        other(x).square().sum().backward()
        assert_close(gradients(other), expected)


def test_state_dict_has_the_keys_of_the_modules():
    chain = ReversibleChain({"stem": nn.Linear(4, 4), "block": AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))})
    assert list(chain.state_dict()) == [
        "stem.weight", "stem.bias", "block.f.weight", "block.f.bias", "block.g.weight", "block.g.bias",
    ]  # fmt: skip
    numbered = nn.Sequential(*chain.children())
    ReversibleChain(chain.children()).load_state_dict(numbered.state_dict())


def test_a_replaced_branch_is_noticed():
    chain = linear_chain()
    chain.set_schedule(uniform(chain, *INVERT))
    chain.get_submodule("1").f = nn.Linear(3, 3).double()
    chain(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert chain.get_submodule("1.f").weight.grad is not None

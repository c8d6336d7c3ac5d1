"""What breaks other reversible runtimes, tried on every operator."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from operator_cases import CASES, all_invert, distance
from torch import Tensor, nn

from revdist.errors import BoundaryModified
from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain
from revdist.reversible.replay import inside_operator

names = pytest.mark.parametrize("name", CASES)


class Around(nn.Module):
    """A network around a chain: something before it, something after it, and a way past it."""

    def __init__(self, chain: ReversibleChain, how: str) -> None:
        super().__init__()
        self.chain = chain
        self.how = how
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> Tensor:
        before = tuple(x * self.scale for x in inputs)
        if self.how == "relu_before":
            before = tuple(torch.relu(x + 1) for x in before)
        if self.how == "channels_last":
            before = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in before)
        if self.how == "transposed":
            before = tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in before)
        if self.how == "a_part_of_something":
            before = tuple(torch.cat([x, x + 1], dim=1).chunk(2, dim=1)[1] for x in before)
        outputs = self.chain(before[0] if len(before) == 1 else before)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        total = sum(out.tanh().sum() for out in outputs)
        if self.how == "skip":
            total = total + sum((x**2).sum() for x in before)
        return total


def gradients(net: Around, inputs: tuple[Tensor, ...], *, plain: bool) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(1)
    net.zero_grad()
    if plain:
        with inside_operator():
            loss = net(*inputs)
    else:
        net.chain.set_schedule(all_invert(net.chain))
        loss = net(*inputs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.load_state_dict(state)
    return found


@names
@pytest.mark.parametrize("how", ["relu_before", "skip", "channels_last", "transposed", "a_part_of_something"])
def test_surroundings_do_not_matter(name: str, how: str) -> None:
    chain, inputs = CASES[name].build()
    net = Around(chain, how)
    copies = [x.clone() for x in inputs]
    expected = gradients(net, inputs, plain=True)
    assert distance(gradients(net, inputs, plain=False), expected) < 1e-9
    for x, before in zip(inputs, copies, strict=True):
        torch.testing.assert_close(x, before, rtol=0, atol=0, msg="the batch was changed")


@names
def test_an_output_edited_in_place_is_an_error_and_not_a_wrong_gradient(name: str) -> None:
    chain, inputs = CASES[name].build()
    chain.set_schedule(all_invert(chain))
    outputs = chain(inputs[0] if len(inputs) == 1 else inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    with torch.no_grad():
        outputs[0].mul_(2)
    with pytest.raises(BoundaryModified):
        sum(out.square().sum() for out in outputs).backward()


@names
def test_an_exception_in_the_middle_leaves_the_chain_usable(name: str) -> None:
    chain, inputs = CASES[name].build()
    net = Around(chain, "plain")
    expected = gradients(net, inputs, plain=True)
    last = list(chain.children())[-1]
    handle = [m for m in last.modules() if not list(m.children())][-1].register_forward_hook(_fail)
    chain.set_schedule(all_invert(chain))
    with pytest.raises(RuntimeError, match="on purpose"):
        net(*inputs)
    handle.remove()
    for key, value in CASES[name].build()[0].state_dict().items():  # batch norm counted the failed forward
        chain.state_dict()[key].copy_(value)
    assert distance(gradients(net, inputs, plain=False), expected) < 1e-9


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")


@names
def test_a_chain_inside_an_operator_is_a_part_of_it(name: str) -> None:
    chain, inputs = CASES[name].build()
    if name.startswith("squeeze"):
        pytest.skip("changes the shape, which a branch may not")

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, x: Tensor) -> Tensor:
            out = self.chain(x if len(inputs) == 1 else (x, x))
            return out if isinstance(out, Tensor) else out[0]

    outer = ReversibleChain([AdditiveCoupling(Inside(), nn.Tanh())])
    net = Around(outer, "plain")
    halves = (inputs[0], inputs[-1] + 1)
    expected = gradients(net, halves, plain=True)
    assert distance(gradients(net, halves, plain=False), expected) < 1e-9


@pytest.fixture(scope="module")
def process_group() -> object:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@names
@pytest.mark.parametrize("how", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_gradients_under_ddp(name: str, how: dict[str, bool], process_group: object) -> None:
    chain, inputs = CASES[name].build()
    net = Around(chain, "plain")
    expected = gradients(net, inputs, plain=True)
    chain.set_schedule(all_invert(chain))
    if any(parameter.grad is None for parameter in net.parameters()):
        how = how | {"find_unused_parameters": True}
    ddp = nn.parallel.DistributedDataParallel(net, **how)
    net.zero_grad()
    torch.manual_seed(1)
    ddp(*inputs).backward()
    found = {key: p.grad for key, p in net.named_parameters() if key in expected}
    assert distance(found, expected) < 1e-9


def test_modes_of_every_operator_are_offered_in_a_fixed_order() -> None:
    for case in CASES.values():
        for modes in case.build()[0].options():
            assert modes[0] is Mode.SAVE
            assert len(set(modes)) == len(modes)

"""OFFLOAD: saved tensors wait in host memory, outside what the device counts."""

from __future__ import annotations

import pytest
import torch
from reversible_models import IMAGES, assert_close, conv_chain, gradients, linear_chain, step, twins, uniform

from revdist.errors import BoundaryModified
from revdist.planning.costs import Mode
from revdist.reversible import host_copy
from revdist.reversible.offload import Offload


def offloading(chain, *others):
    chain.set_schedule(uniform(chain, Mode.OFFLOAD, *others))
    return chain


def test_gradients_are_those_of_plain_autograd():
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(dropout=0.2))
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_close(step(offloading(chain), x), step(plain, x), 1e-12)


def test_the_device_holds_nothing_between_forward_and_backward(ledger_device):
    device = ledger_device(2**30)
    device.activate()
    if not device.enforced:
        pytest.skip("no C++ compiler: the CPU device counts nothing")
    meter = device.meter()
    chain = offloading(conv_chain())
    x = torch.randn(IMAGES, dtype=torch.float64)
    chain(x).sum().backward()
    before = meter.allocated_bytes()
    loss = chain(x).sum()
    assert meter.allocated_bytes() - before < 1024  # the output and the loss
    loss.backward()
    assert meter.allocated_bytes() - before < 1024


def test_backward_twice_with_retain_graph():
    torch.manual_seed(0)
    chain, plain = twins(conv_chain(1))
    offloading(chain)
    x = torch.randn(IMAGES, dtype=torch.float64)
    for model in (chain, plain):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_close(gradients(chain), gradients(plain))


def test_operators_are_inverted_from_an_offloaded_input():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    for invert_even in (0, 1):
        chain.set_schedule([Mode.INVERT if i % 2 == invert_even else Mode.OFFLOAD for i in range(chain.num_operators)])
        x = torch.randn(4, 6, dtype=torch.float64)
        assert_close(step(chain, x), step(plain, x))


def test_of_a_storage_only_what_is_used_is_copied(monkeypatch):
    """A batch is often a view of a whole data set."""
    copied = []
    buffer = host_copy._host_buffer
    monkeypatch.setattr(host_copy, "_host_buffer", lambda source: copied.append(source.numel()) or buffer(source))
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    offloading(chain)
    batches = torch.randn(100, 4, 6, dtype=torch.float64)
    x = batches[37]
    assert_close(step(chain, x), step(plain, x), 1e-12)
    chain(x).sum().backward()
    assert sum(copied) > 0
    assert max(copied) <= x.nbytes + 64


def test_tensors_of_several_types_that_share_a_storage_come_back():
    storage = torch.randn(40)
    tensors = [
        storage[3:7],
        storage[6:30:3],
        storage.view(torch.int64)[9:12],
        storage[0:0],
        storage[5:9].view(2, 2).t(),
    ]
    offload = Offload(storage.device)
    layouts = [offload.add(tensor) for tensor in tensors]
    offload.send()
    fetched = offload.fetch()
    found = [fetched.tensor(layout) for layout in layouts]
    for one, other in zip(found, tensors, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


def test_demotion_leaves_offloaded_operators_alone():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    chain.set_schedule([Mode.OFFLOAD if i % 2 else Mode.SAVE for i in range(chain.num_operators)])
    x = torch.randn(4, 6, dtype=torch.float64)
    loss = chain(x).square().sum()
    assert chain.demote(2**40) > 0
    loss.backward()
    plain(x).square().sum().backward()
    assert_close(gradients(chain), gradients(plain))


def test_editing_the_input_after_the_forward_does_not_matter():
    torch.manual_seed(0)
    chain, plain = twins(linear_chain())
    offloading(chain)
    x = torch.randn(4, 6, dtype=torch.float64)
    loss = chain(x.clone()).square().sum()
    edited = x.clone()
    other = chain(edited).square().sum()
    edited.zero_()
    (loss + other).backward()
    (2 * plain(x).square().sum()).backward()
    assert_close(gradients(chain), gradients(plain))


def test_a_tensor_edited_within_the_forward_is_refused():
    class Edits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = torch.tanh(self.linear(x))
            return x.mul_(2)

    chain = offloading(type(linear_chain())([Edits()]))
    with pytest.raises(BoundaryModified, match="edited in place after it was saved"):
        chain(torch.randn(2, 4)).sum().backward()

"""What a step takes: against plain autograd, and by depth."""

from __future__ import annotations

import itertools

import pytest
import torch
from reversible_models import Plain, uniform
from torch import nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, ReversibleChain


def branch(channels=16):
    layers = []
    for _ in range(2):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    return nn.Sequential(*layers)


def chain_of(depth):
    return ReversibleChain([AdditiveCoupling(branch(), branch()) for _ in range(depth)])


def statistics_bytes(channels):
    """What a batch norm in training keeps in every mode: mean and inverse deviation, in fp32."""
    return 2 * 4 * channels


@pytest.fixture
def peak_of(ledger_device):
    """Peak bytes of a step over what was there before it, gradients included in what was there."""
    device = ledger_device(2**32)
    device.activate()
    if not device.enforced:
        pytest.skip("no C++ compiler: the CPU device counts nothing")
    meter = device.meter()

    def measure(model):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        x = torch.randn(8, 32, 16, 16, requires_grad=True)
        meter.reset_peak()
        before = meter.allocated_bytes()
        model(x).sum().backward()
        return meter.peak_bytes() - before

    return measure


def test_saving_takes_what_plain_autograd_takes(peak_of):
    chain = chain_of(6)
    assert peak_of(chain) <= 1.03 * peak_of(Plain(chain))


def test_inverting_takes_a_small_part_of_plain_autograd(peak_of):
    chain = chain_of(12)
    plain = peak_of(Plain(chain))
    chain.set_schedule(uniform(chain, Mode.INVERT))
    assert peak_of(chain) <= 0.16 * plain


def test_inverting_takes_the_same_at_any_depth_but_for_two_numbers_a_channel_of_a_batch_norm(peak_of):
    peaks = []
    depths = 2, 16
    for depth in depths:
        chain = chain_of(depth)
        chain.set_schedule(uniform(chain, Mode.INVERT))
        peaks.append(peak_of(chain))
    num_norms = 4 * (depths[1] - depths[0])
    assert peaks[1] - peaks[0] == num_norms * statistics_bytes(channels=16)


def test_memory_falls_during_the_backward_as_in_plain_autograd(ledger_device):
    device = ledger_device(2**32)
    device.activate()
    if not device.enforced:
        pytest.skip("no C++ compiler: the CPU device counts nothing")
    meter = device.meter()
    chain = chain_of(6)
    for mode in (Mode.SAVE, Mode.OFFLOAD):
        chain.set_schedule(uniform(chain, mode))
        allocated = []
        chain.observe(lambda event, allocated=allocated: allocated.append(meter.allocated_bytes()))
        chain(torch.randn(8, 32, 16, 16)).sum().backward()
        backward = allocated[chain.num_operators :]
        if mode is Mode.SAVE:
            assert all(later < earlier for earlier, later in itertools.pairwise(backward))
        else:
            assert max(backward) - min(backward) < 2**20

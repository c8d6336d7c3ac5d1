"""Cached activations can be released in the middle of a step, and gradients stay the same."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from reversible_models import assert_close, conv_branch, conv_chain, gradients, images, schedules, uniform
from torch import nn

from revdist.planning.costs import Mode
from revdist.reversible import AdditiveCoupling, Event, ReversibleChain

MIB = 2**20
ALL = 2**60


def wide_chain():
    torch.manual_seed(0)
    return ReversibleChain([AdditiveCoupling(conv_branch(8), conv_branch(8)) for _ in range(6)])


def expected_gradients(chain, x):
    chain = copy.deepcopy(chain)
    torch.manual_seed(4)
    chain(x).square().sum().backward()
    return gradients(chain)


@pytest.mark.parametrize("schedule", range(6))
@pytest.mark.parametrize("num_bytes", [1, 30_000, ALL])
def test_demoted_after_the_forward(schedule, num_bytes):
    torch.manual_seed(0)
    chain = conv_chain(dropout=0.2)
    x = images()
    expected = expected_gradients(chain, x)
    chain.set_schedule(schedules(chain)[schedule])
    torch.manual_seed(4)
    loss = chain(x).square().sum()
    chain.demote(num_bytes)
    loss.backward()
    assert_close(gradients(chain), expected)


@pytest.mark.parametrize(("kind", "operator"), list(itertools.product(("forward", "backward"), range(0, 12, 3))))
def test_demoted_at_any_moment(kind, operator):
    torch.manual_seed(0)
    chain = conv_chain(dropout=0.2)
    x = images()
    expected = expected_gradients(chain, x)
    released = []

    def demote(event):
        if event == Event(kind, operator):
            released.append(chain.demote(ALL))

    chain.observe(demote)
    torch.manual_seed(4)
    chain(x).square().sum().backward()
    assert len(released) == 1
    assert_close(gradients(chain), expected)


def test_demoted_at_every_operator_of_every_schedule():
    torch.manual_seed(0)
    chain = conv_chain(1, dropout=0.2)
    x = images()
    expected = expected_gradients(chain, x)
    chain.observe(lambda event: chain.demote(2000) if event.kind == "backward" else 0)
    for schedule in schedules(chain):
        chain.zero_grad()
        chain.set_schedule(schedule)
        torch.manual_seed(4)
        chain(x).square().sum().backward()
        assert_close(gradients(chain), expected)


def test_demoted_between_two_backwards_of_a_kept_graph():
    torch.manual_seed(0)
    chain = conv_chain(1)
    x = images()
    loss = chain(x).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(chain)
    assert chain.demote(ALL) == 0  # its backward has begun: nothing is taken away from it
    loss.backward()
    assert_close(gradients(chain), [2 * gradient for gradient in once])


def test_released_bytes_are_what_the_allocator_gets_back(activated):
    meter = activated(512 * MIB).meter()
    chain = wide_chain()
    x = torch.randn(4, 16, 16, 16)
    for fraction in (0.1, 0.3, 0.5):
        loss = chain(x).square().sum()
        before = meter.allocated_bytes()
        wanted = int(fraction * before)
        released = chain.demote(wanted)
        assert released >= wanted
        assert before - meter.allocated_bytes() == released
        loss.backward()
    loss = chain(x).square().sum()
    saved = meter.allocated_bytes()
    released = chain.demote(ALL)
    chain.set_schedule(uniform(chain, Mode.INVERT))
    del loss
    loss = chain(x).square().sum()
    assert saved - released == meter.allocated_bytes()
    assert chain.demote(ALL) == 0
    del loss


def test_a_shortage_in_the_forward_is_met_by_demotion(activated):
    """With room for half of what saving needs, a step under SAVE goes through and its gradients are right."""
    roomy = activated(512 * MIB)
    chain = wide_chain()
    x = torch.randn(8, 16, 16, 16)
    expected = expected_gradients(chain, x)
    roomy.meter().reset_peak()
    base = roomy.meter().allocated_bytes()
    chain(x).square().sum().backward()
    peak = roomy.meter().peak_bytes() - base
    chain.zero_grad()
    roomy.deactivate()

    tight = activated(peak // 2, name="cpu-1")
    with pytest.raises(torch.OutOfMemoryError):
        chain(x).square().sum().backward()
    tight.on_shortage(chain.demote)
    chain.zero_grad()
    chain(x).square().sum().backward()
    tight.on_shortage(None)
    assert chain.demoted_bytes > 0
    assert_close(gradients(chain), expected, 1e-5)


def test_memory_taken_away_in_the_middle_of_the_backward(activated):
    roomy = activated(512 * MIB)
    chain = wide_chain()
    x = torch.randn(8, 16, 16, 16)
    expected = expected_gradients(chain, x)
    roomy.meter().reset_peak()
    base = roomy.meter().allocated_bytes()
    chain(x).square().sum().backward()
    peak = roomy.meter().peak_bytes() - base
    chain.zero_grad()
    roomy.deactivate()

    device = activated(peak + 2 * MIB, name="cpu-1")
    device.on_shortage(chain.demote)
    taken = []

    def take(event):
        if event == Event("backward", 9):
            free = device.read().free_bytes
            taken.append(torch.empty(free - 64 * 1024, dtype=torch.uint8))

    chain.observe(take)
    chain(x).square().sum().backward()
    device.on_shortage(None)
    assert taken
    assert chain.demoted_bytes > 0
    assert_close(gradients(chain), expected, 1e-5)


def test_a_replay_that_runs_out_of_memory_demotes_others_and_goes_on():
    """Without a callback in the allocator, as on some devices."""
    torch.manual_seed(0)
    chain = wide_chain()
    x = torch.randn(2, 16, 8, 8)
    expected = expected_gradients(chain, x)
    modes = [Mode.SAVE] * chain.num_operators
    modes[-3] = Mode.INVERT
    chain.set_schedule(modes)
    layer = chain.get_submodule("4.g.6")
    attempts = []

    def run_out_once(*_):
        attempts.append(1)
        if len(attempts) == 2:  # the first run is the forward
            raise torch.OutOfMemoryError("no memory")

    layer.register_forward_pre_hook(run_out_once)
    chain(x).square().sum().backward()
    assert len(attempts) == 3
    assert chain.demoted_bytes > 0
    assert_close(gradients(chain), expected, 1e-5)


def test_events_name_every_forward_and_backward_in_order():
    chain = conv_chain(1)
    for schedule in schedules(chain):
        chain.set_schedule(schedule)
        events = []
        chain.observe(events.append)
        chain(images()).sum().backward()
        numbers = list(range(chain.num_operators))
        assert events == [Event("forward", n) for n in numbers] + [Event("backward", n) for n in reversed(numbers)]
    chain.observe(None)
    events.clear()
    chain(images()).sum().backward()
    assert not events


def test_operators_without_gradients_have_no_backward_event():
    chain = conv_chain(1)
    chain.get_submodule("stem").requires_grad_(False)
    events = []
    chain.observe(events.append)
    chain(images()).sum().backward()
    assert Event("forward", 0) in events
    assert Event("backward", 0) not in events
    assert Event("backward", 1) in events


def test_two_forwards_alive_together_are_both_demoted():
    torch.manual_seed(0)
    chain = conv_chain(1)
    first, second = images(), images()
    (chain(first).square().sum() + chain(second).square().sum()).backward()
    expected = gradients(chain)
    chain.zero_grad()
    for buffer in chain.buffers():
        buffer.zero_()
    losses = [chain(first).square().sum(), chain(second).square().sum()]
    chain.demote(ALL)
    assert all(handle.tensor is None for record in chain.live_records() for handle in record.saved.handles())
    for loss in losses:
        loss.backward()
    assert_close(gradients(chain), expected)


def test_nothing_to_demote():
    chain = ReversibleChain([nn.Linear(4, 4)])
    assert chain.demote(ALL) == 0
    with torch.no_grad():
        chain(torch.randn(2, 4))
    assert chain.demote(ALL) == 0

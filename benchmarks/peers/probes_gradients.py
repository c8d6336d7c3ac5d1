"""Probes of gradients: whether they are those of plain autograd, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers.behaviour import CHANNELS, Network, Probe, Trial, Verdict, compare, features, image
from benchmarks.peers.bodies import Plain
from benchmarks.peers.networks import convolution_branch, couplings, smooth_branch


def normalized() -> nn.Module:
    return convolution_branch(CHANNELS)


def smooth() -> nn.Module:
    return smooth_branch(CHANNELS)


def _compare_step(trial: Trial, step: Callable[[Network], object], branch: Callable[[], nn.Module]) -> Verdict:
    """Run one step that leaves gradients on both networks and compare those of the body."""
    reference, network = trial.pair(branch)
    step(reference)
    step(network)
    return compare(network.body_gradients(), reference.body_gradients())


def frozen_stem(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        network.stem.requires_grad_(False)
        network(image()).square().mean().backward()

    return _compare_step(trial, step, normalized)


def input_without_grad(trial: Trial) -> Verdict:
    return _compare_step(trial, lambda network: network.body(features()).square().mean().backward(), normalized)


def relu_before(trial: Trial) -> Verdict:
    return _compare_step(
        trial, lambda network: network.body(network.stem(image()).relu()).square().mean().backward(), normalized
    )


def skip_connection(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        x = network.stem(image())
        (x + network.body(x)).square().mean().backward()

    return _compare_step(trial, step, normalized)


def output_edited(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        y = network.body(network.stem(image()))
        y.mul_(2.0)
        y.square().mean().backward()

    return _compare_step(trial, step, normalized)


def non_contiguous(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        network.body(network.stem(image().mT).mT).square().mean().backward()

    return _compare_step(trial, step, normalized)


def channels_last(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network(image().to(memory_format=torch.channels_last)).square().mean().backward()

    return _compare_step(trial, step, normalized)


class _Dropout(nn.Module):
    """Drops half; keeps the masks it draws, so that a reference can drop the same."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.drawn: list[Tensor] = []
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(x).sigmoid()
        mask = self.given.pop(0) if self.given else torch.bernoulli(torch.full_like(y, 0.5))
        self.drawn.append(mask)
        return 2.0 * y * mask


def _compare_with_same_masks(trial: Trial, step: Callable[[Network], object], *, num_forwards: int) -> Verdict:
    reference, network = trial.pair(_Dropout)
    step(network)
    for pair, reference_pair in zip(network.branches, reference.branches, strict=True):
        for branch, reference_branch in zip(pair, reference_pair, strict=True):
            assert isinstance(branch, _Dropout)
            assert isinstance(reference_branch, _Dropout)
            reference_branch.given = branch.drawn[:num_forwards]  # what comes after are replays
    step(reference)
    return compare(network.body_gradients(), reference.body_gradients())


def dropout(trial: Trial) -> Verdict:
    return _compare_with_same_masks(trial, lambda network: network(image()).square().mean().backward(), num_forwards=1)


class _KnowsAutocast(nn.Module):
    """Computes something else under autocast than outside of it, so that a replay outside of it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if torch.is_autocast_enabled("cpu") else 2.0
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.convolution(x)
        return scale * y.sigmoid()


def autocast(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = network.body(features().requires_grad_()).square().mean()
        loss.backward()

    return _compare_step(trial, step, _KnowsAutocast)


def double_backward(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        x = image().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    return _compare_step(trial, step, smooth)


def gradient_of_parameters(trial: Trial) -> Verdict:
    reference, network = trial.pair(normalized)
    of_reference, of_network = (
        torch.autograd.grad(net(image()).square().mean(), net.body_parameters(), allow_unused=True)
        for net in (reference, network)
    )
    return compare(of_network, of_reference)


def backward_twice(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        loss = network(image()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()

    return _compare_step(trial, step, normalized)


def two_forwards(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        first, second = network(image()), network(2.0 * image())
        second.square().mean().backward()
        first.square().mean().backward()

    return _compare_with_same_masks(trial, step, num_forwards=2)


def nested(trial: Trial) -> Verdict:
    """A branch that is itself such a network, half as wide."""
    build = trial.subject.careful or trial.subject.build

    def step(make: Callable[..., nn.Module]) -> Network:
        def inner() -> nn.Module:
            return make(couplings(lambda: smooth_branch(CHANNELS // 2), 1, dtype=torch.float64))

        network = Network(make, [(inner(), inner())])
        network(image()).square().mean().backward()
        return network

    reference, network = step(Plain), step(build)
    return compare(network.body_gradients(), reference.body_gradients())


def compiled_branch(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        for pair in network.branches:
            for branch in pair:
                branch.compile(backend="aot_eager")
        network(image()).square().mean().backward()

    return _compare_step(trial, step, normalized)


class _FailsOnce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = smooth()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            self.fails = False
            raise FloatingPointError("an error inside a branch")
        y: Tensor = self.branch(x)
        return y


def after_exception(trial: Trial) -> Verdict:
    def step(network: Network) -> None:
        last = network.branches[-1][1]
        assert isinstance(last, _FailsOnce)
        last.fails = True
        try:
            network(image())
        except FloatingPointError:
            network(image()).square().mean().backward()

    return _compare_step(trial, step, _FailsOnce)


PROBES = (
    Probe("frozen-stem", "Body trains behind a frozen stem", frozen_stem),
    Probe("input-without-grad", "Body trains on an input without grad", input_without_grad),
    Probe("relu-before", "A ReLU before the body", relu_before),
    Probe("skip-connection", "A skip connection around the body", skip_connection),
    Probe("output-edited", "Output edited in place", output_edited),
    Probe("non-contiguous", "Input that is not contiguous", non_contiguous),
    Probe("channels-last", "channels_last", channels_last),
    Probe("dropout", "Dropout in a branch", dropout),
    Probe("autocast", "Autocast replayed", autocast),
    Probe("double-backward", "Double backward", double_backward),
    Probe("parameter-gradients", "torch.autograd.grad on parameters", gradient_of_parameters),
    Probe("backward-twice", "Backward twice (retain_graph)", backward_twice),
    Probe("two-forwards", "Two forwards with dropout, then their backwards", two_forwards),
    Probe("nested", "Nested inside a branch", nested),
    Probe("compiled", "torch.compile of the branches", compiled_branch),
    Probe("exception", "A step after an exception in a branch", after_exception),
)

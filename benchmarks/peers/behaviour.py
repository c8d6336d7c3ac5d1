"""What each library does where others have gone wrong: yes, no, or a silent error.

A probe builds the same small network twice, runs one copy with plain autograd and the other with the
library, and compares. It returns a `Verdict`, or raises, or crashes: each runs in a process of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers.bodies import Plain, Subject
from benchmarks.peers.isolation import call_isolated
from benchmarks.peers.networks import Couplings, couplings, parameters, relative_error

TOLERANCE = 1e-6
"""Largest relative L2 error of a gradient that passes, in float64, where rounding leaves about 1e-13."""

CHANNELS, SIZE, BATCH, DEPTH = 4, 6, 4, 2


class Answer(enum.StrEnum):
    YES = "yes"
    NO = "no"
    SILENT = "silent error"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What a library did in one probe, and why that is the answer."""

    answer: Answer
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """One row of the table."""

    key: str
    question: str
    """What works where the answer is yes."""
    run: Callable[[Trial], Verdict]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One library in one probe: builds the network to be tested and the reference beside it."""

    subject: Subject

    def pair(self, branch: Callable[[], nn.Module], *, depth: int = DEPTH) -> tuple[Network, Network]:
        """The network under plain autograd and under the library, with equal weights, in float64."""
        network = couplings(branch, depth, dtype=torch.float64)
        return Network(Plain, copy.deepcopy(network)), Network(
            self.subject.careful or self.subject.build, copy.deepcopy(network)
        )


class Network(nn.Module):
    """A trainable stem, the body that a library runs, and a trainable head."""

    def __init__(self, build: Callable[[Couplings], nn.Module], network: Couplings) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 2 * CHANNELS, 3, padding=1, dtype=torch.float64)
        self.body = build(network)
        self.head = nn.Conv2d(2 * CHANNELS, 1, 1, dtype=torch.float64)
        self.branches = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.stem(x)))
        return y

    def body_parameters(self) -> list[nn.Parameter]:
        return list(parameters(self.branches))

    def body_gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.body_parameters()]


def image() -> Tensor:
    """A batch of images (B, 3, H, W), the same at each call."""
    return _random(3)


def features() -> Tensor:
    """An input for the body alone (B, 2C, H, W), the same at each call."""
    return _random(2 * CHANNELS)


def _random(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, channels, SIZE, SIZE, dtype=torch.float64, generator=generator)


def compare(values: Sequence[Tensor | None], reference: Sequence[Tensor | None], what: str = "gradient") -> Verdict:
    """Yes where all values are there and right; else a silent error, since nothing was raised."""
    expected = [tensor for tensor in reference if tensor is not None]
    assert len(expected) == len(reference), "the reference lacks a gradient"
    missing = sum(value is None for value in values)
    if missing:
        return Verdict(Answer.SILENT, f"{missing} of {len(values)} {what}s are missing")
    error = relative_error(values, expected)
    if not error <= TOLERANCE:
        return Verdict(Answer.SILENT, f"{what}s are off by {error:.1g} (relative L2)")
    return Verdict(Answer.YES)


def all_of(*verdicts: Verdict) -> Verdict:
    """The first that is not yes, else yes."""
    return next((verdict for verdict in verdicts if verdict.answer is not Answer.YES), Verdict(Answer.YES))


def judge(probe: Probe, subject: Subject, *, timeout_s: float) -> Verdict:
    """What the library does in this probe, found out in a process of its own."""
    ending = call_isolated(lambda: probe.run(Trial(subject)), timeout_s=timeout_s)
    if ending.trouble:
        return Verdict(Answer.NO, ending.trouble)
    assert isinstance(ending.value, Verdict)
    return ending.value

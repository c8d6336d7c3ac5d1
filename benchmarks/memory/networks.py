"""The networks whose memory and time are predicted and measured, each with a batch and a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.models.glow import generative_loss, glow
from revdist.models.reformer import reformer
from revdist.models.revnet import revnet38, revnet164

PIXELS = 32
GLOW_PIXELS = 32
LENGTH = 256
CLASSES = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A model to be built, and what one step of it runs on."""

    key: str
    label: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    """An input and its target, always the same."""
    loss_fn: Callable[..., Tensor] = F.cross_entropy

    def make(self) -> Made:
        torch.manual_seed(0)
        model = self.build()
        inputs, target = self.batch()
        return Made(model, inputs, target, self.loss_fn)


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A network in memory."""

    model: nn.Module
    inputs: Tensor
    target: Tensor
    loss_fn: Callable[..., Tensor]

    def loss(self, output: Any) -> Tensor:
        return self.loss_fn(output, self.target, reduction="sum") / len(self.inputs)

    def step(self) -> None:
        """Forward, loss and backward; gradients add up."""
        self.loss(self.model(self.inputs)).backward()

    def lay_out_gradients(self) -> None:
        """As they are in every step of a training but the first."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)


def _images(count: int, pixels: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(count, 3, pixels, pixels), torch.arange(count) % CLASSES)


def _text(count: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(0, 256, (count, LENGTH)), torch.randint(0, 256, (count, LENGTH)))


def _glow_loss(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    return generative_loss(output, target, reduction, num_dimensions=3 * GLOW_PIXELS**2)


NETWORKS = (
    Network(key="revnet38", label="RevNet-38, batch 16", build=revnet38, batch=_images(16, PIXELS)),
    Network(key="revnet164", label="RevNet-164, batch 4", build=revnet164, batch=_images(4, PIXELS)),
    Network(key="reformer", label="Reformer, 4 x 256 bytes", build=lambda: reformer(256), batch=_text(4)),
    Network(
        key="glow",
        label="Glow (invertible convolutions), batch 32",
        build=lambda: glow(CLASSES, image_size=GLOW_PIXELS, in_channels=3, steps=4, levels=2, hidden=64),
        batch=_images(32, GLOW_PIXELS),
        loss_fn=_glow_loss,
    ),
)


def network(key: str) -> Network:
    return next(each for each in NETWORKS if each.key == key)

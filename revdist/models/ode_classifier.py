"""A neural ODE as a classifier, trained through exactly reversible steps.

    B batch   C channels   H, W image size   t time

Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations", NeurIPS 2018: the
residual blocks of a stage become one vector field f(t, z), integrated from 0 to 1. Here the steps
are those of `ReversibleODE`, so the gradient is that of the discretised network itself and memory
does not grow with the number of steps.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from revdist.reversible.chain import ReversibleChain
from revdist.reversible.ode import ReversibleODE


class Field(nn.Module):
    """f(t, z): two 3x3 convolutions on group-normalised features, with t as a further channel."""

    def __init__(self, channels: int, *, groups: int = 8) -> None:
        super().__init__()
        groups = min(groups, channels)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t: float, z_BCHW: Tensor) -> Tensor:
        t_B1HW = torch.full_like(z_BCHW[:, :1], t)
        hidden_BCHW = self.conv1(torch.cat([torch.relu(self.norm1(z_BCHW)), t_B1HW], dim=1))
        out_BCHW: Tensor = self.conv2(torch.cat([torch.relu(self.norm2(hidden_BCHW)), t_B1HW], dim=1))
        return out_BCHW


class ODEClassifier(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, num_classes).

    downsample: factor between the image and the features on which the ODE runs
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 32,
        num_steps: int = 8,
        in_channels: int = 1,
        downsample: int = 1,
        method: Literal["alf", "mccallum_foster"] = "alf",
        damping: float = 1.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, 2 * downsample + 1, stride=downsample, padding=downsample)
        ode = ReversibleODE(Field(channels), num_steps, method=method, damping=damping)
        self.chain = ReversibleChain({"ode": ode})
        self.head = nn.Sequential(
            nn.GroupNorm(min(8, channels), channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        ode = cast(ReversibleODE, self.chain.get_submodule("ode"))
        z_BCHW, _ = self.chain(ode.start(self.stem(x_BCHW)))
        logits: Tensor = self.head(z_BCHW)
        return logits


def ode_classifier(
    num_classes: int = 10,
    *,
    channels: int = 32,
    num_steps: int = 8,
    in_channels: int = 1,
    downsample: int = 1,
    method: Literal["alf", "mccallum_foster"] = "alf",
    damping: float = 1.0,
) -> ODEClassifier:
    """A small ODE classifier for small images."""
    return ODEClassifier(
        num_classes,
        channels=channels,
        num_steps=num_steps,
        in_channels=in_channels,
        downsample=downsample,
        method=method,
        damping=damping,
    )

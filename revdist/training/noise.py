"""Random images, for planning and timing a network whose own data are not at hand.

What a network costs depends on the shape of its input, not on what is in it. Nothing can be learnt here.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from revdist.errors import ConfigError


@final
class NoiseImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Sample number i is the same noise whenever it is asked for."""

    def __init__(self, num_samples: int, shape: tuple[int, int, int], num_classes: int) -> None:
        self.num_samples = num_samples
        self.shape = shape
        self.num_classes = num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        generator = torch.Generator().manual_seed(index)
        return torch.randn(self.shape, generator=generator), index % self.num_classes


def noise_images(
    *, size: int = 224, channels: int = 3, num_classes: int = 1000, num_samples: int = 1024
) -> tuple[NoiseImages, None]:
    """`(train, None)`: random images (channels, size, size) with labels that mean nothing.

    Raises ConfigError unless every number is positive.
    """
    for name, value in {
        "size": size,
        "channels": channels,
        "num_classes": num_classes,
        "num_samples": num_samples,
    }.items():
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    return NoiseImages(num_samples, (channels, size, size), num_classes), None

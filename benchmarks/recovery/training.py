"""What the peers train, each started its own way: a small network, about 20 ms a step, saved every ten steps."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdist.models import revnet_digits
from revdist.training.datasets import digits

GLOBAL_BATCH = 16
MODEL_KWARGS: dict[str, Any] = {"units": (2, 2), "filters": (16, 16, 32), "scale": 1}
OPTIMIZER_KWARGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
SAVE_EVERY = 10
ENDLESS = 1_000_000
"""Steps: every run is ended from outside."""


class Training:
    """One rank's part: the model, the optimizer, the step count and what is written down."""

    def __init__(self, folder: str, *, rank: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.folder = Path(folder)
        self.rank = rank
        self.step = 0
        self.model: nn.Module = revnet_digits(**MODEL_KWARGS)
        self.optimizer = torch.optim.SGD(self.model.parameters(), **OPTIMIZER_KWARGS)
        train, _ = digits()
        self._images_BCHW, self._labels_B = (
            torch.utils.data.default_collate(part) for part in zip(*train, strict=True)
        )
        self._log = (self.folder / f"steps-{rank}-{os.getpid()}.log").open("a", buffering=1)

    def loss(self, model: nn.Module, *, world_size: int) -> Tensor:
        """Of this rank's equal share of the step's batch."""
        share = GLOBAL_BATCH // world_size
        first = self.step * GLOBAL_BATCH % (len(self._labels_B) - GLOBAL_BATCH) + self.rank % world_size * share
        chosen = slice(first, first + share)
        return F.cross_entropy(model(self._images_BCHW[chosen]), self._labels_B[chosen])

    def done(self) -> None:
        """A step has been taken."""
        self.step += 1
        self._log.write(f"{self.step} {time.time()}\n")

    @property
    def is_to_be_saved(self) -> bool:
        return self.rank == 0 and self.step % SAVE_EVERY == 0

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        torch.save(self.state(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

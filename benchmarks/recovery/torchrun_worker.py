"""One worker of the training under torchrun: goes on from the newest checkpoint after each restart."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.recovery.training import ENDLESS, Training


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    training = Training(folder, rank=dist.get_rank())
    checkpoint = Path(folder) / "checkpoint.pt"
    if checkpoint.exists():
        training.restore(torch.load(checkpoint, weights_only=True))
    model = DistributedDataParallel(training.model)
    while training.step < ENDLESS:
        training.optimizer.zero_grad()
        training.loss(model, world_size=dist.get_world_size()).backward()
        training.optimizer.step()
        training.done()
        if training.is_to_be_saved:
            training.save(checkpoint)


if __name__ == "__main__":
    main(sys.argv[1])

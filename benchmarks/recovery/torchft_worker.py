"""A replica of the training under torchft, that knows its lighthouse: `torchft_worker.py FOLDER RANK NUM_RANKS`."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

from benchmarks.recovery.training import ENDLESS, Training

TIMEOUT = timedelta(seconds=5)


def main(folder: str, rank: int, num_ranks: int) -> None:
    training = Training(folder, rank=rank)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()},
        replica_id=f"replica_{rank}",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        timeout=TIMEOUT,
        quorum_timeout=timedelta(seconds=30),
        hostname="127.0.0.1",
    )
    model = DistributedDataParallel(manager, training.model)
    optimizer = Optimizer(manager, training.optimizer)
    while training.step < ENDLESS:
        optimizer.zero_grad()
        training.loss(model, world_size=num_ranks).backward()
        before = manager.current_step()
        optimizer.step()
        if manager.current_step() > before:  # else the step was given up and is taken again
            training.step = manager.current_step() - 1
            training.done()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

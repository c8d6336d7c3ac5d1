"""One rank of a data-parallel training written by hand, on a CPU device and a core: `plain_worker.py JOB`.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them. JOB holds, as JSON, per rank its
core, the name and capacity of its device, its share of the batch and the file to which it writes when each step
is done; how many samples a step has; and whether all ranks use one micro-batch size, as a job with one
configuration does. The gradient is that of the whole batch whatever the shares. A rank whose WORLD_SIZE is 1
trains by itself. It goes on until it is ended.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
RANK = int(os.environ["RANK"])
os.sched_setaffinity(0, {JOB["cores"][RANK]})  # before torch starts its threads

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from benchmarks.unequal.cases import OPTIMIZER  # noqa: E402
from revdist.devices import open_device  # noqa: E402
from revdist.models import revnet_digits  # noqa: E402
from revdist.training.datasets import digits  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    together = os.environ["WORLD_SIZE"] != "1"
    if together:
        dist.init_process_group("gloo")
    name, capacity_bytes = JOB["devices"][RANK]
    open_device(name=name, capacity_bytes=capacity_bytes).activate("plain DDP")
    torch.manual_seed(0)
    train, _ = digits()
    images_BCHW, labels_B = (torch.utils.data.default_collate(part) for part in zip(*train, strict=True))
    model = revnet_digits()
    global_batch = JOB["global_batch"]
    share, offset = JOB["shares"][RANK], sum(JOB["shares"][:RANK])
    micro_batch = _largest_micro_batch(model, images_BCHW[:share], labels_B[:share])
    if JOB["same_micro_batch"] and together:
        sizes = torch.tensor(micro_batch)
        dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
        micro_batch = int(sizes)
    replicated = DistributedDataParallel(model, gradient_as_bucket_view=True) if together else model
    optimizer = torch.optim.SGD(replicated.parameters(), **OPTIMIZER)
    scale = dist.get_world_size() / sum(JOB["shares"]) if together else 1 / share
    with Path(JOB["out"][RANK]).open("w", encoding="utf-8", buffering=1) as done:
        for step in itertools.count():
            first = step * global_batch % (len(train) - global_batch) + offset
            chosen = torch.arange(first, first + share)
            optimizer.zero_grad(set_to_none=False)
            parts = chosen.split(micro_batch)
            for number, part in enumerate(parts):
                with replicated.no_sync() if together and number < len(parts) - 1 else nullcontext():
                    loss = F.cross_entropy(replicated(images_BCHW[part]), labels_B[part], reduction="sum")
                    (loss * scale).backward()
            optimizer.step()
            done.write(f"{time.time()}\n")


def _largest_micro_batch(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> int:
    """Most samples of a share that fit, found by trying with a quarter to spare for DDP's buckets."""
    size = len(images_BCHW)
    while True:
        try:
            for _ in range(2):
                room = torch.empty(
                    4 * sum(4 * parameter.numel() for parameter in model.parameters()), dtype=torch.uint8
                )
                F.cross_entropy(model(images_BCHW[:size]), labels_B[:size]).backward()
                del room
        except torch.OutOfMemoryError:
            size //= 2
            if size == 0:
                raise
        else:
            return size
        finally:
            model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()

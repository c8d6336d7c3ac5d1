"""Runs a function on several ranks, each a process of its own in one gloo group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_on_ranks(function: Callable[[int], Any], folder: Path, num_ranks: int = 2) -> list[Any]:
    """What `function(rank)` returns on each rank. The function must be importable."""
    multiprocessing.spawn(_rank, (function, str(folder), num_ranks), nprocs=num_ranks, join=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)]


def _rank(rank: int, function: Callable[[int], Any], folder: str, num_ranks: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()

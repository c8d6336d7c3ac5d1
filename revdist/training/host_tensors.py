"""Tensors in host memory that no device's allocator counts, and copies of a training state in them.

On a CPU device they are not charged to its ledger: the copy of a state is part of the host, as it is
with a GPU, whose memory it does not take either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor


def host_tensor(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """An uninitialised tensor on the CPU. pinned: in memory that a GPU copies to by itself."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if pinned or not num_bytes:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8)).view(dtype).view(tuple(shape))


@final
class Staging:
    """Room for a copy of a state, made at the first copy and used again for the later ones."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' values now, by name; they hold until the next copy. Raises MemoryError."""
        staged = {name: self._place(name, tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            staged[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()
        self._room = staged
        return staged

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        room = self._room.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = host_tensor(tensor.shape, tensor.dtype, pinned=tensor.is_cuda)
        return room

"""What autograd keeps in place of the tensors that a forward saves."""

from __future__ import annotations

import torch
from torch import Tensor

from revdist.reversible.offload import Layout

Owned = tuple[Tensor, int]
"""Stands for a parameter or buffer, which stays in any case: it and its version. A tuple is quickest to make."""


class Handle:
    """Stands for one tensor that a forward saved."""

    __slots__ = ("__weakref__", "_shape_and_type", "layout", "tensor", "version")

    def __init__(
        self, tensor: Tensor | None, version: int, shape_and_type: tuple[torch.Size, torch.dtype] | None = None
    ) -> None:
        self.tensor = tensor
        """Detached, for the tensor itself may own the node that owns this handle. None: to be rebuilt."""
        self.version = version
        self.layout: Layout | None = None
        """Where the tensor is in host memory, if it is."""
        self._shape_and_type = shape_and_type

    def drop(self) -> None:
        """Let the tensor go; it can be put back as `tensor`."""
        if self.tensor is not None:
            self._shape_and_type = self.shape_and_type
            self.tensor = None

    @property
    def shape_and_type(self) -> tuple[torch.Size, torch.dtype]:
        if self._shape_and_type is not None:
            return self._shape_and_type
        assert self.tensor is not None
        return self.tensor.shape, self.tensor.dtype

    @property
    def num_bytes(self) -> int:
        shape, dtype = self.shape_and_type
        return shape.numel() * dtype.itemsize

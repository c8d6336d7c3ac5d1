"""The streams between two operators of a chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revdist.errors import BoundaryModified
from revdist.reversible.grid import on_grid
from revdist.reversible.offload import Fetched, Layout, Offload
from revdist.reversible.operator import Operator, Streams


class Boundary:
    """The streams between two operators, with their versions when they were noted."""

    __slots__ = ("_before", "_layouts", "_offload", "_streams", "_versions")

    def __init__(self, streams: Streams, *, before: Operator | None) -> None:
        """The input of operator `before`; of none: the output of the chain."""
        self._before = before
        self._streams = tuple([stream.detach() for stream in streams])
        self._versions = [stream._version for stream in streams]
        self._offload: Offload | None = None
        self._layouts: tuple[Layout, ...] = ()

    def read(self) -> Streams:
        """The streams. Raises BoundaryModified where one was edited in place since."""
        if self._offload is not None:
            return self.found_in(self._offload.fetch())
        if any(s._version != version for s, version in zip(self._streams, self._versions, strict=True)):
            name = "the output of the chain" if self._before is None else f"the input of operator {self._before.name}"
            raise BoundaryModified(
                f"{name} was edited in place, but the backward rebuilds activations from it: "
                "edit a clone instead, or set inplace=False"
            )
        return self._streams

    @property
    def tensors(self) -> Streams:
        """The streams that are on the device, unchecked."""
        return self._streams

    def found_in(self, fetched: Fetched) -> Streams:
        """The streams among what has come back from host memory."""
        return tuple(fetched.tensor(layout) for layout in self._layouts)

    def to_host(self, offload: Offload) -> None:
        """Keep the streams in host memory from now on."""
        self._layouts = tuple(offload.add(stream) for stream in self._streams)
        self._offload = offload
        self._streams = ()


class Exit:
    """The end of a chain: what comes after the last operator."""

    def __init__(self, outputs: Streams) -> None:
        self.boundary = Boundary(outputs, before=None)

    def available(self) -> Streams:
        """The output of the chain, which always is."""
        return self.boundary.read()


def entering(streams: Streams, operator: Operator, before: Operator | None, dim: int) -> Streams:
    """The streams as an operator takes them: joined or in halves, and on its grid if it has one."""
    streams = converted(streams, operator.num_streams, dim)
    if operator.grid is None or (before is not None and before.grid == operator.grid):
        return streams
    return tuple(on_grid(stream, operator.grid) for stream in streams)


def laid_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor where it has these strides, else a copy that has them."""
    if tensor.stride() == strides:
        return tensor
    once = tensor[tuple([slice(None if stride else 1) for stride in strides])]  # repeated ones are one in memory
    copied = torch.empty_strided(once.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(once)
    return copied.expand(tensor.shape)


def converted(streams: Streams, num_streams: int, dim: int, *, first_size: int = 0) -> Streams:
    """The streams as one tensor or as a pair, joined or split along `dim`; by default in equal halves."""
    if len(streams) == num_streams:
        return streams
    if num_streams == 1:
        return (torch.cat(streams, dim=dim),)
    size = streams[0].shape[dim]
    first_size = first_size or size - size // 2
    return tuple(torch.split_with_sizes(streams[0], [first_size, size - first_size], dim=dim))

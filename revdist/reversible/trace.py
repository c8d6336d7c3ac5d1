"""What autograd saved for one operator by itself, found when it has to go after all.

Hooks on saved tensors cost little, but each is a call into Python between two kernels, with cold caches: some
3% of a step where everything is kept. So an operator that saves runs as in plain autograd, and only where its
tensors are to be dropped are hooks put on them, one by one, in the order in which the forward saved them.
A node tells what it saved, but not in which order: that is learnt from a first forward that runs under hooks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

Packed = TypeVar("Packed")

sequence_number = torch._C._autograd._get_sequence_nr
"""Number that the next node made in this thread gets."""
_ACCUMULATES = 2**64 - 1
"""Number of the nodes at parameters, which every forward shares."""


class Place(NamedTuple):
    """Where a saved tensor is found."""

    node: int
    """Number of the node, in the order in which they were made."""
    attribute: str
    item: int
    """Number in the attribute, which may be several."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where the nodes of a forward keep what they saved."""

    nodes: tuple[str, ...]
    """Their kinds."""
    places: tuple[Place, ...]
    """Of what hooks get, in the order in which the forward saved."""
    others: frozenset[Place]
    """Of what they do not get: Python numbers that took part."""


class Trace:
    """The nodes that one forward of an operator made: those of its outputs, and through them the others."""

    __slots__ = ("__weakref__", "_first_number", "_nodes", "roots")

    def __init__(self, outputs: Iterable[Tensor], first_number: int) -> None:
        """first_number: `sequence_number` before the forward."""
        self._first_number = first_number
        nodes = (output.grad_fn for output in outputs)
        self.roots = [node for node in nodes if node is not None and self._is_new(node)]
        self._nodes: list[Node] | None = None

    def forget(self) -> None:
        """Let the nodes go."""
        self.roots, self._nodes = [], []

    def layout(self, packed: Sequence[object]) -> Layout | None:
        """Where the nodes keep what hooks have packed, in that order; None where some of it is not told, or not all
        is theirs."""
        saved = list(self._saved())
        place_of = {id(one.data): place for place, one in saved if one.unpack_hook is not None}
        found = tuple(place_of[id(one)] for one in packed if id(one) in place_of)
        if not len(found) == len(packed) == len(place_of):
            return None
        return Layout(self._kinds(), found, frozenset(place for place, _ in saved) - set(found))

    def fits(self, layout: Layout) -> bool:
        """Whether the nodes are those of the layout and have everything, unchanged since it was saved."""
        if self._kinds() != layout.nodes:
            return False
        found = dict(self._saved())
        if found.keys() != {*layout.places, *layout.others} or any(
            saved.unpack_hook is not None for saved in found.values()
        ):
            return False
        nodes = self._made()
        try:
            for place in layout.places:
                getattr(nodes[place.node], _read_as(type(nodes[place.node]), place.attribute))
        except RuntimeError:  # edited in place since it was saved
            return False
        return True

    def hand_over(self, layout: Layout, pack: Callable[[Tensor], Packed], unpack: Callable[[Packed], Tensor]) -> None:
        """Give every saved tensor to `pack`, and let the backward ask `unpack` for it. The layout must fit."""
        saved = dict(self._saved())
        for place in layout.places:
            packed = pack(saved[place].data)  # hooks get another object for the same tensor
            saved[place].register_hooks(functools.partial(_given, packed), unpack)

    def tensors(self, layout: Layout) -> Iterator[Tensor]:
        """What hooks would get of all that the nodes saved and still have."""
        return (saved.data for place, saved in self._saved() if place not in layout.others)

    def _saved(self) -> Iterator[tuple[Place, Any]]:
        """What the nodes saved and still have."""
        for number, node in enumerate(self._made()):
            for attribute in _attributes(type(node)):
                try:
                    value = getattr(node, attribute)
                except RuntimeError:  # a node written in Python that the backward has freed
                    continue
                for item, saved in enumerate(value if isinstance(value, tuple) else (value,)):
                    if saved.data is not None:
                        yield Place(number, attribute, item), saved

    def _kinds(self) -> tuple[str, ...]:
        return tuple(node.name() for node in self._made())

    def _made(self) -> list[Node]:
        """The nodes in the order in which they were made."""
        if self._nodes is None:
            found, pending = set(self.roots), list(self.roots)
            while pending:
                for node, _ in pending.pop().next_functions:
                    if node is not None and node not in found and self._is_new(node):
                        found.add(node)
                        pending.append(node)
            self._nodes = sorted(found, key=lambda node: node._sequence_nr())
        return self._nodes

    def _is_new(self, node: Node) -> bool:
        return self._first_number <= node._sequence_nr() < _ACCUMULATES


def are_hooks_in_force() -> bool:
    """Whether somebody else's hooks get what autograd saves now, such as those of gradient checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _given(packed: Packed, _: Tensor) -> Packed:
    return packed


@functools.cache
def _attributes(kind: type) -> tuple[str, ...]:
    """Names under which nodes of a kind have saved tensors, unread."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


@functools.cache
def _read_as(kind: type, attribute: str) -> str:
    """The name under which the same tensors are read: a node written in Python has another than those of torch."""
    name = attribute.removeprefix("_raw")
    return name if hasattr(kind, name) else name.removeprefix("_")

"""What one forward of an operator saved, while it is kept and after: as handles, or in autograd's own nodes.

Ordinary autograd runs. `saved_tensors_hooks` hands every tensor that the forward saves over, and gets a `Handle`
back, which the backward gives to `unpack`. Where an operator saves, mostly nothing of ours comes in between, see
`trace`: hooks are put on what the nodes saved when it has to go after all.

Autograd owns the handles; they are known here only weakly, and so are the nodes of a forward.

Packing happens some twenty times an operator, so it is written for speed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import final

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revdist.errors import ReplayDiverged
from revdist.planning.costs import Mode
from revdist.reversible.compiler import never_compiled
from revdist.reversible.conditions import Conditions, Inputs
from revdist.reversible.handles import Handle, Owned
from revdist.reversible.operator import Operator, Streams
from revdist.reversible.replay import inside_operator
from revdist.reversible.trace import Layout, Trace, sequence_number

Unpack = Callable[[Handle | Owned], Tensor]
"""What the backward calls with what it was given in place of a tensor."""

_KEEPING = (Mode.SAVE, Mode.OFFLOAD)


@final
class SavedTensors:
    """Of one forward: kept until they are dropped, and filled again by a replay."""

    __slots__ = ("_conditions", "_handles", "_layout", "_operator", "_owned_ids", "_packed", "_trace")

    def __init__(self, operator: Operator, conditions: Conditions) -> None:
        self._operator = operator
        self._conditions = conditions
        self._owned_ids: set[int] = set()
        """Of parameters and buffers; filled where a tensor is packed."""
        self._handles: list[weakref.ref[Handle]] = []
        self._packed: list[Tensor | None] = []
        """In the order saved, while tensors are kept: parameters and buffers, None for the next handle."""
        self._trace: weakref.ref[Trace] | None = None
        """The nodes that hold what the forward saved, where no hooks do."""
        self._layout: Layout | None = None

    def __len__(self) -> int:
        """How many handles were given out; 0 where autograd keeps what it saved."""
        return len(self._handles)

    def run(
        self,
        inputs: Streams,
        mode: Mode,
        shapes: Inputs,
        traces: list[Trace] | None,
        *,
        unpack: Unpack,
        begin: Callable[[object], None],
    ) -> Streams:
        """The operator's forward, with what it saves handed over or, with SAVE, left to autograd.

        traces: gets the nodes of a forward whose tensors are left to autograd, to be owned until the chain's graph
        goes. None: they cannot be left.
        begin: a method, called when the backward comes to such nodes, which own its object where they saved anything
        """
        if mode is not Mode.SAVE or traces is None:
            return self._run_hooked(inputs, self._keep if mode in _KEEPING else self._note, unpack)
        first_number, key = sequence_number(), self._conditions.key(shapes)
        known = self._operator.layouts
        self._layout = known.get(key)
        if self._layout is not None:
            with inside_operator(), self._conditions.first_run():
                outputs = self._operator.forward(inputs)
            trace = Trace(outputs, first_number)
            if trace.roots:
                hook = begin if self._layout.places else _weakly(begin)  # one that saved nothing is not needed
                for root in trace.roots:
                    root.register_prehook(hook)
                self._trace = weakref.ref(trace)
                traces.append(trace)
        elif key in known:  # it cannot be learnt
            outputs = self._run_hooked(inputs, self._keep, unpack)
        else:
            packed: list[Handle | Owned] = []
            outputs = self._run_hooked(inputs, functools.partial(_keep_listed, self, packed), unpack)
            known[key] = Trace(outputs, first_number).layout(packed)
            packed.clear()
        return outputs

    def handles(self) -> Iterator[Handle]:
        """Those that autograd still holds."""
        return (handle for handle in (reference() for reference in self._handles) if handle is not None)

    def tensors(self) -> Iterator[Tensor]:
        """What is in memory, parameters and buffers aside."""
        yield from (handle.tensor for handle in self.handles() if handle.tensor is not None)
        if (left := self._left_to_autograd()) is not None and self._layout is not None:
            owned, saved = self._conditions.owned_ids(), left.tensors(self._layout)
            yield from (tensor for tensor in saved if id(tensor) not in owned and id(tensor._base) not in owned)

    def can_be_dropped(self) -> bool:
        """Whether what autograd keeps by itself can be found; what handles keep always is."""
        if self._trace is None:
            return True
        if self._layout is None or (trace := self._trace()) is None:
            return False
        fits = trace.fits(self._layout)
        if not fits:
            self._operator.layouts.clear()  # a branch was replaced: the next forward is learnt from
        return fits

    def drop(self, unpack: Unpack) -> None:
        """Let all go, but what a replay is given: what batch norms took is looked for only now."""
        if (left := self._left_to_autograd()) is not None:
            assert self._layout is not None
            self._owned_ids = self._conditions.owned_ids()
            left.hand_over(self._layout, self._note, unpack)
            self._layout = None
            return
        statistics, saved = self._conditions.statistics, (reference() for reference in self._handles)
        for tensor in self._packed:
            if tensor is not None:
                statistics.notice(tensor, owned=True)
            elif (handle := next(saved)) is not None and handle.tensor is not None:
                statistics.notice(handle.tensor, owned=False)
            else:
                statistics.interrupted()
        self._packed = []
        for handle in self.handles():
            handle.drop()

    def forget_nodes(self) -> bool:
        """Let the nodes go that keep what was saved, where they do; returns whether they did."""
        if self._trace is None:
            return False
        if (trace := self._trace()) is not None:
            trace.forget()
        return True

    def fill(self, captured: list[tuple[Tensor, int]]) -> None:
        """Put what a replay captured into the handles. Raises ReplayDiverged where it saved something else."""
        if len(captured) != len(self._handles):
            raise ReplayDiverged(
                f"operator {self._operator.name} saved {len(self._handles)} tensors in its forward and "
                f"{len(captured)} when run again: it must do the same each time, so keep state and chance outside "
                "torch's out of it"
            )
        for reference, (tensor, version) in zip(self._handles, captured, strict=True):
            handle = reference()
            if handle is None:
                continue
            shape, dtype = handle.shape_and_type
            if shape != tensor.shape or dtype != tensor.dtype:
                raise ReplayDiverged(
                    f"operator {self._operator.name} saved {dtype} of shape {tuple(shape)} in its forward and "
                    f"{tensor.dtype}, {tuple(tensor.shape)} when run again: it must do the same each time"
                )
            handle.tensor, handle.version = tensor, version

    @never_compiled
    def _keep(self, tensor: Tensor) -> Handle | Owned:
        """Called by autograd with each tensor that the forward saves: kept until the backward asks."""
        if id(tensor) in self._owned_ids:
            self._packed.append(tensor)
            return tensor, tensor._version
        kept = tensor.detach()
        base = tensor._base
        if base is not None and id(base) in self._owned_ids:
            self._packed.append(kept)
            return kept, tensor._version
        handle = Handle(kept, tensor._version)
        self._handles.append(weakref.ref(handle))
        self._packed.append(None)
        return handle

    @never_compiled
    def _note(self, tensor: Tensor) -> Handle | Owned:
        """The same where nothing is kept but what batch norms took: the backward has it rebuilt."""
        base = tensor._base
        owned = id(tensor if base is None else base) in self._owned_ids
        self._conditions.statistics.notice(tensor, owned=owned)
        if owned:
            return (tensor if base is None else tensor.detach()), tensor._version
        handle = Handle(None, tensor._version, (tensor.shape, tensor.dtype))
        self._handles.append(weakref.ref(handle))
        return handle

    def _run_hooked(self, inputs: Streams, pack: Callable[[Tensor], Handle | Owned], unpack: Unpack) -> Streams:
        self._owned_ids = self._conditions.owned_ids()
        with inside_operator(), self._conditions.first_run(), saved_tensors_hooks(pack, unpack):
            return self._operator.forward(inputs)

    def _left_to_autograd(self) -> Trace | None:
        """The nodes that hold what the forward saved, with nothing of ours in between."""
        return self._trace() if self._trace is not None and self._layout is not None else None


@never_compiled
def _keep_listed(saved: SavedTensors, packed: list[Handle | Owned], tensor: Tensor) -> Handle | Owned:
    kept = saved._keep(tensor)
    packed.append(kept)
    return kept


def _weakly(method: Callable[[object], None]) -> Callable[[object], None]:
    """Calls a method where something else still owns its object."""
    reference = weakref.WeakMethod(method)

    def call(argument: object) -> None:
        if (there := reference()) is not None:
            there(argument)

    return call

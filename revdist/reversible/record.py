"""What one operator's forward leaves for its backward: handles in place of saved tensors.

Ordinary autograd runs; where an operator saves, mostly with nothing of ours in between, see `saved`. Else
`saved_tensors_hooks` hands every tensor that the forward saves to
the record, which returns a `Handle`; the backward gives the handle to `Record.unpack`, and where its
tensor is gone the record runs the operator once more and fills all of its handles.

Who keeps what alive is what makes memory fall during the backward as it does in plain autograd:
autograd owns handles and, through `unpack` or a hook where the backward begins, their record; a record knows its
handles only weakly, and so the nodes of its forward, which what comes after the chain owns. A record owns the one
after it until it has got its outputs, since those may have to be rebuilt from the exit.

Packing and unpacking happen some twenty times an operator, so they are written for speed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as _graph_is_kept
from torch.autograd.graph import saved_tensors_hooks

from revdist.errors import BoundaryModified, ReplayDiverged
from revdist.planning.costs import Mode
from revdist.reversible.boundary import Boundary, Exit, converted
from revdist.reversible.compiler import never_compiled
from revdist.reversible.conditions import Ambience, Conditions, Inputs
from revdist.reversible.handles import Handle, Owned
from revdist.reversible.offload import Offload
from revdist.reversible.operator import Operator, Streams
from revdist.reversible.replay import Complete, Replay, inside_operator
from revdist.reversible.saved import Layout, Trace, sequence_number

Part = Literal["internals", "boundary", "notes"]
"""What a record keeps: saved tensors, the operator's input, notes of the forward."""

_KEEPING = (Mode.SAVE, Mode.OFFLOAD)

DEMOTION = threading.RLock()
"""Held while a record is demoted or says that it cannot be: a shortage may be met in another thread."""


class Record:
    """One forward of one operator, and how its backward gets what it needs."""

    __slots__ = (
        "__weakref__", "_after", "_before", "_conditions", "_first_size", "_handles", "_inputs", "_layout",
        "_may_invert", "_offload", "_owned_ids", "_packed", "_rebuilt", "_shortage", "_split_dim", "_trace", "begun",
        "boundary", "complete", "linked", "mode", "operator",
    )  # fmt: skip

    def __init__(
        self,
        operator: Operator,
        mode: Mode,
        inputs: Streams,
        ambience: Ambience,
        *,
        before: Record | None,
        split_dim: int,
        shortage: Callable[[int], int],
        may_invert: bool = True,
    ) -> None:
        self.operator = operator
        self.mode = mode
        self.boundary: Boundary | None = Boundary(inputs, before=operator)
        """The operator's inputs, held in every mode but INVERT so that the operator before can be inverted."""
        self.begun = False
        """Whether the backward has asked for a tensor."""
        self.linked = True
        """Whether a backward that frees the graph has yet to come."""
        self.complete = False
        """Whether the forward has ended and what comes after it is known."""
        self._inputs: Inputs = tuple([(stream.requires_grad, stream.dtype, stream.stride()) for stream in inputs])
        self._conditions = Conditions(operator, ambience)
        self._owned_ids: set[int] = set()
        """Of parameters and buffers; filled where a tensor is packed."""
        self._handles: list[weakref.ref[Handle]] = []
        self._packed: list[Tensor | None] = []
        """In the order saved, while tensors are kept: parameters and buffers, None for the next handle."""
        self._trace: weakref.ref[Trace] | None = None
        """The nodes that hold what the forward saved, where no hooks do."""
        self._layout: Layout | None = None
        self._rebuilt: Streams | None = None
        self._offload: Offload | None = None
        self._before = weakref.ref(before) if before is not None else None
        self._after: Record | Exit | weakref.ref[Record] | None = None
        self._split_dim = split_dim
        self._first_size = 0
        self._shortage = shortage
        self._may_invert = may_invert and Mode.INVERT in operator.modes

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

    def run(self, inputs: Streams, traces: list[Trace] | None) -> Streams:
        """The operator's forward, with what it saves handed to this record or, with SAVE, left to autograd.

        traces: gets the nodes of a forward whose tensors are left to autograd, to be owned until the chain's graph
        goes. None: they cannot be left.
        """
        if self.mode is not Mode.SAVE or traces is None:
            return self._run_hooked(inputs, self._keep if self.mode in _KEEPING else self._note)
        first_number, key = sequence_number(), self._conditions.key(self._inputs)
        known = self.operator.layouts
        self._layout = known.get(key)
        if self._layout is not None:
            with inside_operator(), self._conditions.first_run():
                outputs = self.operator.forward(inputs)
            trace = Trace(outputs, first_number)
            if trace.roots:
                begin = self._begin if self._layout.places else _weakly(self)  # one that saved nothing is not needed
                for root in trace.roots:
                    root.register_prehook(begin)
                self._trace = weakref.ref(trace)
                traces.append(trace)
        elif key in known:  # it cannot be learnt
            outputs = self._run_hooked(inputs, self._keep)
        else:
            packed: list[Handle | Owned] = []
            outputs = self._run_hooked(inputs, functools.partial(_keep_listed, self, packed))
            known[key] = Trace(outputs, first_number).layout(packed)
            packed.clear()
        return outputs

    def _run_hooked(self, inputs: Streams, pack: Callable[[Tensor], Handle | Owned]) -> Streams:
        self._owned_ids = self._conditions.owned_ids()
        with inside_operator(), self._conditions.first_run(), saved_tensors_hooks(pack, self.unpack):
            return self.operator.forward(inputs)

    def unpack(self, packed: Handle | Owned) -> Tensor:
        """Called by autograd when the backward needs a saved tensor."""
        if isinstance(packed, tuple):
            tensor, version = packed
        else:
            if self.linked:
                self.begin()
            if packed.tensor is None:
                self.rebuild()
                assert packed.tensor is not None
            tensor, version = packed.tensor, packed.version
            if self.mode is not Mode.SAVE and _graph_is_kept():
                packed.drop()  # the graph stays, its activations need not
        if tensor._version != version:
            raise BoundaryModified(
                f"a tensor that the backward of operator {self.operator.name} needs was edited in place after it was "
                f"saved: version {tensor._version}, saved at {version}; edit a clone instead, or set inplace=False"
            )
        return tensor

    def end_forward(self, outputs: Streams, ambience: Ambience) -> Ambience:
        """Note what the forward left; returns what it left of its ambience.

        Raises BoundaryModified where it edited its input in place.
        """
        assert self.boundary is not None
        self.boundary.read()
        self._first_size = outputs[0].shape[self._split_dim] if len(outputs) == 2 else 0
        ambience = ambience.after(self._conditions)
        self._conditions.close(ambience)
        if self.mode is Mode.OFFLOAD:
            self._to_host(self.boundary)
            self._conditions.forget()  # it comes back and is never run again
        return ambience

    def close(self, after: Record | Exit) -> None:
        """Say where the outputs are found: the next operator starts, or the chain ends."""
        self._after = after
        self.complete = True
        if self.mode is Mode.INVERT:
            self.boundary = None

    def _begin(self, _: object) -> None:
        if self.linked:
            self.begin()

    def begin(self) -> None:
        """The backward comes to this operator: from now on this record cannot be demoted."""
        with DEMOTION:
            self.begun = True
        before = self._previous()
        if before is not None and before._offload is not None:
            before._offload.prefetch()
        if not _graph_is_kept():  # else another backward may come
            self.linked = False
            if self.mode is not Mode.INVERT:
                after, self._after = self._after, None
                if isinstance(after, Record):
                    after.finish()

    def finish(self) -> None:
        """The backward is past this operator. Where its nodes own this record, it goes with the whole graph only."""
        if self._handles and any(True for _ in self.handles()):
            return
        after, self._after = self._after, None
        if isinstance(after, Record):
            after.finish()
        if self._trace is not None:
            self.boundary = self._rebuilt = None
            self._conditions.forget()
            if (trace := self._trace()) is not None:
                trace.forget()

    def tensors(self) -> Iterator[Tensor]:
        """What the record keeps in memory."""
        yield from (handle.tensor for handle in self.handles() if handle.tensor is not None)
        if (left := self._left_to_autograd()) is not None and self._layout is not None:
            owned, saved = self._conditions.owned_ids(), left.tensors(self._layout)
            yield from (tensor for tensor in saved if id(tensor) not in owned and id(tensor._base) not in owned)
        yield from self._conditions.statistics.tensors()
        if self.boundary is not None:
            yield from self.boundary.tensors

    def outside(self) -> Iterator[Tensor]:
        """What the caller of the chain is expected to keep in memory too: its input and its output."""
        if self._before is None and self.boundary is not None:
            yield from self.boundary.tensors
        if isinstance(self._after, Exit):
            yield from self._after.boundary.tensors

    def handles(self) -> Iterator[Handle]:
        """The handles that autograd still holds."""
        return (handle for handle in (reference() for reference in self._handles) if handle is not None)

    def available(self) -> Streams | None:
        """The operator's inputs where they are held or have just been rebuilt."""
        if self._rebuilt is not None or self.boundary is None:
            return self._rebuilt
        return self.boundary.read()

    def rebuild(self) -> None:
        """Fill the handles by running the operator once more; where memory is short, demote others and try again."""
        try:
            self._rebuild()
        except torch.OutOfMemoryError:
            if not self._shortage(sum(handle.num_bytes for handle in self.handles())):
                raise
            self._rebuild()

    def _rebuild(self) -> None:
        if self._offload is not None:
            self._from_host(self._offload)
        elif self.boundary is not None:
            self._rerun(self.boundary.read())
        else:
            self._invert_and_capture()

    def _to_host(self, boundary: Boundary) -> None:
        offload = Offload(boundary.tensors[0].device)
        kept = [(handle, handle.tensor) for handle in self.handles() if handle.tensor is not None]
        for handle, tensor in kept:
            if tensor._version == handle.version:  # one edited since stays, and is refused when it is needed
                handle.layout = offload.add(tensor)
        boundary.to_host(offload)
        for handle, _ in kept:
            if handle.layout is not None:
                handle.drop()
        self._offload = offload

    def _from_host(self, offload: Offload) -> None:
        fetched = offload.fetch()
        for handle in self.handles():
            if handle.tensor is None and handle.layout is not None:
                handle.tensor = fetched.tensor(handle.layout)
                handle.version = handle.tensor._version
        if self._is_inputs_wanted():
            assert self.boundary is not None
            self._rebuilt = self.boundary.found_in(fetched)

    def _rerun(self, inputs: Streams) -> None:
        replay = Replay(self._conditions, self._inputs, len(self._handles), inputs_wanted=False)
        with self._conditions.restored(), contextlib.suppress(Complete):
            self.operator.rerun(inputs, replay)
        self._fill(replay.captured)

    def _invert_and_capture(self) -> None:
        wanted = self._is_inputs_wanted()
        replay = Replay(self._conditions, self._inputs, len(self._handles), inputs_wanted=wanted)
        outputs = self._outputs()
        with self._conditions.restored(), contextlib.suppress(Complete):
            inputs = self.operator.rebuild(outputs, replay)
            if wanted:
                self._rebuilt = self._typed(inputs)
        self._fill(replay.captured)
        self._release_after()

    def _is_inputs_wanted(self) -> bool:
        """Whether the record before this is to be inverted, from this operator's inputs."""
        before = self._previous()
        return before is not None and before.boundary is None

    def _previous(self) -> Record | None:
        return self._before() if self._before is not None else None

    def _fill(self, captured: list[tuple[Tensor, int]]) -> None:
        if len(captured) != len(self._handles):
            raise ReplayDiverged(
                f"operator {self.operator.name} saved {len(self._handles)} tensors in its forward and {len(captured)} "
                "when run again: it must do the same each time, so keep state and chance outside torch's out of it"
            )
        for reference, (tensor, version) in zip(self._handles, captured, strict=True):
            handle = reference()
            if handle is None:
                continue
            shape, dtype = handle.shape_and_type
            if shape != tensor.shape or dtype != tensor.dtype:
                raise ReplayDiverged(
                    f"operator {self.operator.name} saved {dtype} of shape {tuple(shape)} in its forward and "
                    f"{tensor.dtype}, {tuple(tensor.shape)} when run again: it must do the same each time"
                )
            handle.tensor, handle.version = tensor, version

    def _outputs(self) -> Streams:
        """The operator's outputs, inverted from the nearest boundary that is there."""
        pending: list[Record] = []
        source = self._source()
        while (streams := source.available()) is None:
            assert isinstance(source, Record)
            pending.append(source)
            source = source._source()
        for record in reversed(pending):
            streams = record.invert(streams)
        return self._converted(streams)

    def _source(self) -> Record | Exit:
        after = self._after() if isinstance(self._after, weakref.ref) else self._after
        assert after is not None, "the graph after this operator has been freed"
        return after

    def invert(self, outputs: Streams) -> Streams:
        """The operator's inputs from the next one's, without capturing anything."""
        replay = Replay(self._conditions, self._inputs, 0, inputs_wanted=True)
        with self._conditions.restored(), replay.inverting():
            return self._typed(self.operator.inverse(self._converted(outputs)))

    def _converted(self, streams: Streams) -> Streams:
        """The next operator's inputs as this operator's outputs: joined or halved where they differ."""
        return converted(streams, len(self._inputs), self._split_dim, first_size=self._first_size)

    def _typed(self, inputs: Streams) -> Streams:
        return tuple(s.detach().to(dtype) for s, (_, dtype, _) in zip(inputs, self._inputs, strict=True))

    def _release_after(self) -> None:
        """The outputs are not needed any more: let the record after this go with its graph."""
        after = self._after
        if isinstance(after, Record):
            after._rebuilt = None
            if not _graph_is_kept():
                after.finish()
            if after._handles and not _graph_is_kept():  # one without handles is kept by nothing but this
                self._after = weakref.ref(after)

    def release(self, part: Part) -> None:
        """Drop a part of what the record keeps, of a forward whose backward will not be run."""
        if part == "internals":
            self._drop_internals()
        elif part == "boundary":
            self.boundary = None
        else:
            self._conditions.forget()

    def can_be_demoted(self) -> bool:
        """Whether this record keeps tensors that could be rebuilt later in this backward."""
        can_run_again = Mode.INVERT in self.operator.modes or Mode.RECOMPUTE in self.operator.modes
        if not (self.mode is Mode.SAVE and self.complete and not self.begun and can_run_again):
            return False
        if self._trace is None:
            return True
        if self._layout is None or (trace := self._trace()) is None:
            return False
        fits = trace.fits(self._layout)
        if not fits:
            self.operator.layouts.clear()  # a branch was replaced: the next forward is learnt from
        return fits

    def demote(self) -> None:
        """Drop what the record keeps, to be rebuilt by inverting or by running again from its inputs."""
        if self._may_invert and self._outputs_will_be_there():
            self.mode = Mode.INVERT
            self.boundary = None
        else:
            self.mode = Mode.RECOMPUTE
        self._drop_internals()

    def _drop_internals(self) -> None:
        """Let saved tensors go, but what a replay is given: what batch norms took is looked for only now."""
        if (left := self._left_to_autograd()) is not None:
            assert self._layout is not None
            self._owned_ids = self._conditions.owned_ids()
            left.hand_over(self._layout, self._note, self.unpack)
            self._layout = None
            return
        saved = (reference() for reference in self._handles)
        for tensor in self._packed:
            if tensor is not None:
                self._conditions.statistics.notice(tensor, owned=True)
            elif (handle := next(saved)) is not None and handle.tensor is not None:
                self._conditions.statistics.notice(handle.tensor, owned=False)
            else:
                self._conditions.statistics.interrupted()
        self._packed = []
        for handle in self.handles():
            handle.drop()

    def _left_to_autograd(self) -> Trace | None:
        """The nodes that hold what the forward saved, with nothing of this record in between."""
        return self._trace() if self._trace is not None and self._layout is not None else None

    def _outputs_will_be_there(self) -> bool:
        after = self._after
        if isinstance(after, Record):
            return after.boundary is not None or after._rebuilt is not None or not after.begun
        return isinstance(after, Exit)


@never_compiled
def _keep_listed(record: Record, packed: list[Handle | Owned], tensor: Tensor) -> Handle | Owned:
    kept = record._keep(tensor)
    packed.append(kept)
    return kept


def _weakly(record: Record) -> Callable[[object], None]:
    """Begins the record where something else still owns it: the one before, which asks for its input."""
    reference = weakref.ref(record)

    def begin(_: object) -> None:
        if (there := reference()) is not None:
            there._begin(_)

    return begin

"""What one operator's forward leaves for its backward, and how the backward gets it back.

What a forward saved is with its `SavedTensors`. The backward gives the handles that stand for it to `Record.unpack`,
and where a tensor is gone the record runs the operator once more and fills all of its handles.

Who keeps what alive is what makes memory fall during the backward as it does in plain autograd:
autograd owns handles and, through `unpack` or a hook where the backward begins, their record; a record knows its
handles only weakly, and so the nodes of its forward, which what comes after the chain owns. A record owns the one
after it until it has got its outputs, since those may have to be rebuilt from the exit.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as _graph_is_kept

from revdist.errors import BoundaryModified
from revdist.planning.costs import Mode
from revdist.reversible.boundary import Boundary, Exit, converted, laid_out
from revdist.reversible.conditions import Ambience, Conditions, Inputs
from revdist.reversible.handles import Handle, Owned
from revdist.reversible.offload import Offload
from revdist.reversible.operator import Operator, Streams
from revdist.reversible.replay import Complete, Replay
from revdist.reversible.saved_tensors import SavedTensors
from revdist.reversible.trace import Trace

Part = Literal["internals", "boundary", "notes"]
"""What a record keeps: saved tensors, the operator's input, notes of the forward."""

DEMOTION = threading.RLock()
"""Held while a record is demoted or says that it cannot be: a shortage may be met in another thread."""


class Record:
    """One forward of one operator, and how its backward gets what it needs."""

    __slots__ = (
        "__weakref__", "_after", "_before", "_conditions", "_first_size", "_inputs", "_may_invert", "_offload",
        "_output_strides", "_rebuilt", "_shortage", "_split_dim", "begun", "boundary", "complete", "linked", "mode",
        "operator", "saved",
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
        self.saved = SavedTensors(operator, self._conditions)
        self._rebuilt: Streams | None = None
        self._offload: Offload | None = None
        self._before = weakref.ref(before) if before is not None else None
        self._after: Record | Exit | weakref.ref[Record] | None = None
        self._split_dim = split_dim
        self._first_size = 0
        self._output_strides: tuple[tuple[int, ...], ...] | None = None
        """Of a forward that drew random numbers: which element gets which depends on them."""
        self._shortage = shortage
        self._may_invert = may_invert and Mode.INVERT in operator.modes

    def run(self, inputs: Streams, traces: list[Trace] | None) -> Streams:
        """The operator's forward. traces: as `SavedTensors.run` takes them."""
        return self.saved.run(inputs, self.mode, self._inputs, traces, unpack=self.unpack, begin=self._begin)

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
        if self._conditions.drew:
            self._output_strides = tuple([output.stride() for output in outputs])
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
        if any(True for _ in self.saved.handles()):
            return
        after, self._after = self._after, None
        if isinstance(after, Record):
            after.finish()
        if self.saved.forget_nodes():
            self.boundary = self._rebuilt = None
            self._conditions.forget()

    def tensors(self) -> Iterator[Tensor]:
        """What the record keeps in memory."""
        yield from self.saved.tensors()
        yield from self._conditions.statistics.tensors()
        if self.boundary is not None:
            yield from self.boundary.tensors

    def outside(self) -> Iterator[Tensor]:
        """What the caller of the chain is expected to keep in memory too: its input and its output."""
        if self._before is None and self.boundary is not None:
            yield from self.boundary.tensors
        if isinstance(self._after, Exit):
            yield from self._after.boundary.tensors

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
            if not self._shortage(sum(handle.num_bytes for handle in self.saved.handles())):
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
        kept = [(handle, handle.tensor) for handle in self.saved.handles() if handle.tensor is not None]
        for handle, tensor in kept:
            if tensor._version == handle.version:  # one edited since stays, and is refused when it is needed
                handle.layout = offload.add(tensor)
        boundary.to_host(offload)
        offload.send()
        for handle, _ in kept:
            if handle.layout is not None:
                handle.drop()
        self._offload = offload

    def _from_host(self, offload: Offload) -> None:
        fetched = offload.fetch()
        for handle in self.saved.handles():
            if handle.tensor is None and handle.layout is not None:
                handle.tensor = fetched.tensor(handle.layout)
                handle.version = handle.tensor._version
        if self._is_inputs_wanted():
            assert self.boundary is not None
            self._rebuilt = self.boundary.found_in(fetched)

    def _rerun(self, inputs: Streams) -> None:
        replay = Replay(self._conditions, self._inputs, len(self.saved), inputs_wanted=False)
        with self._conditions.restored(), contextlib.suppress(Complete):
            self.operator.rerun(inputs, replay)
        self.saved.fill(replay.captured)

    def _invert_and_capture(self) -> None:
        wanted = self._is_inputs_wanted()
        replay = Replay(self._conditions, self._inputs, len(self.saved), inputs_wanted=wanted)
        outputs = self._outputs()
        with self._conditions.restored(), contextlib.suppress(Complete):
            inputs = self.operator.rebuild(outputs, replay)
            if wanted:
                self._rebuilt = self._typed(inputs)
        self.saved.fill(replay.captured)
        self._release_after()

    def _is_inputs_wanted(self) -> bool:
        """Whether the record before this is to be inverted, from this operator's inputs."""
        before = self._previous()
        return before is not None and before.boundary is None

    def _previous(self) -> Record | None:
        return self._before() if self._before is not None else None

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
        outputs = converted(streams, len(self._inputs), self._split_dim, first_size=self._first_size)
        if self._output_strides is None:
            return outputs
        return tuple(laid_out(output, strides) for output, strides in zip(outputs, self._output_strides, strict=True))

    def _typed(self, inputs: Streams) -> Streams:
        return tuple(s.detach().to(dtype) for s, (_, dtype, _) in zip(inputs, self._inputs, strict=True))

    def _release_after(self) -> None:
        """The outputs are not needed any more: let the record after this go with its graph."""
        after = self._after
        if isinstance(after, Record):
            after._rebuilt = None
            if not _graph_is_kept():
                after.finish()
            if len(after.saved) and not _graph_is_kept():  # one without handles is kept by nothing but this
                self._after = weakref.ref(after)

    def release(self, part: Part) -> None:
        """Drop a part of what the record keeps, of a forward whose backward will not be run."""
        if part == "internals":
            self.saved.drop(self.unpack)
        elif part == "boundary":
            self.boundary = None
        else:
            self._conditions.forget()

    def can_be_demoted(self) -> bool:
        """Whether this record keeps tensors that could be rebuilt later in this backward."""
        can_run_again = Mode.INVERT in self.operator.modes or Mode.RECOMPUTE in self.operator.modes
        may_go = self.mode is Mode.SAVE and self.complete and not self.begun and can_run_again
        return may_go and self.saved.can_be_dropped()

    def demote(self) -> None:
        """Drop what the record keeps, to be rebuilt by inverting or by running again from its inputs."""
        if self._may_invert and self._outputs_will_be_there():
            self.mode = Mode.INVERT
            self.boundary = None
        else:
            self.mode = Mode.RECOMPUTE
        self.saved.drop(self.unpack)

    def _outputs_will_be_there(self) -> bool:
        after = self._after
        if isinstance(after, Record):
            return after.boundary is not None or after._rebuilt is not None or not after.begun
        return isinstance(after, Exit)

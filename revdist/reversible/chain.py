"""The chain: runs its operators forward, each under the mode that the schedule gives it.

Gradients are those of plain autograd under every schedule; see `record` for how. A schedule is data
that the chain reads at each forward, so switching it rebuilds nothing and touches no parameter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_current_graph_task_keep_graph as _graph_is_kept
from torch._C._autograd import _saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]

from revdist.errors import UsageError
from revdist.planning.costs import Mode, Schedule
from revdist.reversible.boundary import Exit, converted, entering
from revdist.reversible.conditions import Ambience
from revdist.reversible.demotion import LiveRecords
from revdist.reversible.operator import Operator, Streams, operators_of
from revdist.reversible.record import Record
from revdist.reversible.replay import is_inside_operator
from revdist.reversible.trace import Trace, are_hooks_in_force


class Event(NamedTuple):
    """An operator starts its forward or its backward."""

    kind: Literal["forward", "backward"]
    operator: int
    """Its number in the chain."""


class ReversibleChain(nn.Module):
    """A sequence of modules, reversible and ordinary ones mixed, that runs under a schedule.

    Takes one tensor, which is halved along `split_dim` at the entrance of each run of couplings and
    joined at its exit, or a pair of halves; returns what it was given. The modules are registered
    under the names of a mapping, or numbered. Inside an operator of another chain it is a part of
    that operator and runs plainly.
    """

    def __init__(self, operators: Mapping[str, nn.Module] | Iterable[nn.Module], *, split_dim: int = 1) -> None:
        super().__init__()
        named = operators.items() if isinstance(operators, Mapping) else enumerate(operators)
        for name, module in named:
            self.add_module(str(name), module)
        self.split_dim = split_dim
        self._planned: tuple[tuple[nn.Module | None, ...], tuple[Operator, ...]] = ((), ())
        self._modes: tuple[Mode, ...] = ()
        self.never_inverted: frozenset[int] = frozenset()
        """Numbers of operators that are run again, not inverted, where `demote` releases what they hold."""
        self._live = LiveRecords()
        self._observer: Callable[[Event], None] | None = None
        self._last_event: Event | None = None
        if not self.operators:
            raise UsageError("a chain needs at least one operator")

    @property
    def operators(self) -> tuple[Operator, ...]:
        """What is planned, in the order of the forward: each coupling counts as two."""
        elements = tuple(self._modules.values())
        if self._planned[0] != elements:
            planned = [operators_of(name, module) for name, module in self._modules.items() if module is not None]
            self._planned = elements, tuple(operator for operators in planned for operator in operators)
        return self._planned[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled chain starts without live forwards and without an observer."""
        return self.__dict__ | {"_live": LiveRecords(), "_observer": None, "_last_event": None}

    @property
    def num_operators(self) -> int:
        return len(self.operators)

    @property
    def operator_names(self) -> tuple[str, ...]:
        return tuple(operator.name for operator in self.operators)

    def options(self) -> tuple[tuple[Mode, ...], ...]:
        """Per operator, the modes it can take."""
        return tuple(operator.modes for operator in self.operators)

    @property
    def schedule(self) -> tuple[Mode, ...]:
        """The mode of each operator, from the next forward on."""
        return _as_far_as_offered(self._modes, self.operators)

    def set_schedule(self, modes: Sequence[Mode | str]) -> None:
        """Give each operator its mode, from the next forward on. A forward already run keeps its own.

        Raises UsageError where the number of modes or a mode does not fit the chain.
        """
        if len(modes) != self.num_operators:
            raise UsageError(
                f"a schedule of {len(modes)} modes does not fit a chain of {self.num_operators} operators: "
                "solve a profile of this model"
            )
        for operator, mode in zip(self.operators, modes, strict=True):
            if mode not in operator.modes:
                raise UsageError(
                    f"operator {operator.name} cannot take mode {mode}: it offers {', '.join(operator.modes)}"
                )
        self._modes = tuple(Mode(mode) for mode in modes)

    def demote(self, num_bytes: int) -> int:
        """Release cached activations of the running step, to be rebuilt when the backward needs them.

        Drops what operators with SAVE hold, where their backward has not begun, until at least
        `num_bytes` are free or nothing is left; returns the bytes released. Allocates nothing, so a
        failing allocation may call it.
        """
        return self._live.demote(num_bytes)

    @property
    def demoted_bytes(self) -> int:
        """Bytes that demotion has released since the chain was made."""
        return self._live.demoted_bytes

    def live_records(self) -> list[Record]:
        """What the operators of forwards whose backward may still come keep, in the order of the forward."""
        return self._live.alive()

    @property
    def observer(self) -> Callable[[Event], None] | None:
        """What `observe` was given."""
        return self._observer

    def observe(self, callback: Callable[[Event], None] | None) -> None:
        """Call back at the start of each operator's forward and backward, from the next forward on.

        An operator's backward lasts until the next event: autograd runs later operators first. An
        operator whose output needs no gradient has no backward.
        """
        self._observer = callback

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        streams = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if torch.is_grad_enabled() and not is_inside_operator() and _saved_tensors_hooks_is_enabled():
            outputs = self._run(streams)
        else:
            outputs = self._run_plainly(streams)
        return outputs[0] if len(outputs) == 1 else (outputs[0], outputs[1])

    def _run_plainly(self, inputs: Streams) -> Streams:
        streams, before = inputs, None
        for operator in self.operators:
            streams, before = operator.forward(entering(streams, operator, before, self.split_dim)), operator
        return converted(streams, len(inputs), self.split_dim)

    def _run(self, inputs: Streams) -> Streams:
        self._live.prune()
        streams, record, ambience = inputs, None, Ambience(inputs[0].device)
        traces: list[Trace] = []
        # What owns a trace is a node behind it, so the last operator's needs the one that joins or halves its outputs.
        joined = self.operators[-1].num_streams != len(inputs)
        num_traced = 0 if are_hooks_in_force() else self.num_operators - (0 if joined else 1)
        for number, (operator, mode) in enumerate(zip(self.operators, self.schedule, strict=True)):
            streams = entering(streams, operator, None if record is None else record.operator, self.split_dim)
            may_invert = number not in self.never_inverted
            record = self._start(operator, mode, streams, ambience, before=record, may_invert=may_invert)
            if number == 0:
                _finish_before(record, streams)
            if self._observer is not None:
                self._observer(Event("forward", number))
            outputs = record.run(streams, traces if number < num_traced else None)
            ambience = record.end_forward(outputs, ambience)
            if self._observer is not None:
                self._watch_backward(number, inputs=streams, outputs=outputs)
            streams = outputs
            del outputs  # or it would keep the halves alive while their joined copy is used
        assert record is not None
        streams = converted(streams, len(inputs), self.split_dim)
        record.close(Exit(streams))
        if traces:
            _own(traces, streams)
        return streams

    def _start(
        self,
        operator: Operator,
        mode: Mode,
        inputs: Streams,
        ambience: Ambience,
        *,
        before: Record | None,
        may_invert: bool,
    ) -> Record:
        record = Record(
            operator,
            mode,
            inputs,
            ambience,
            before=before,
            split_dim=self.split_dim,
            shortage=self._live.demote,
            may_invert=may_invert,
        )
        if before is not None:
            before.close(record)
        self._live.add(record)
        return record

    def _watch_backward(self, number: int, *, inputs: Streams, outputs: Streams) -> None:
        def emit(_: object) -> None:
            if self._observer is not None and self._last_event != event:
                self._last_event = event
                self._observer(event)

        event = Event("backward", number)
        self._last_event = Event("forward", number)
        for stream in outputs:
            if stream.grad_fn is not None and all(stream is not other for other in inputs):
                stream.grad_fn.register_prehook(emit)


def _finish_before(record: Record, inputs: Streams) -> None:
    """Let the first operator's input go where the backward is past the chain."""
    for stream in inputs:
        if stream.grad_fn is not None:
            stream.grad_fn.register_prehook(functools.partial(_finish, weakref.ref(record)))


def _finish(first: weakref.ref[Record], _: object) -> None:
    if (record := first()) is not None and not _graph_is_kept():
        record.finish()


def _own(traces: list[Trace], outputs: Streams) -> None:
    """Let the last node of the chain own what its operators left to autograd, but never itself."""
    nodes = [stream.grad_fn for stream in outputs if stream.grad_fn is not None]
    if not nodes:  # no backward will come
        return
    last = max(nodes, key=lambda node: node._sequence_nr())
    others = [trace for trace in traces if last not in trace.roots]
    last.register_prehook(functools.partial(_own_only, others))


def _own_only(_: list[Trace], __: object) -> None:
    """Called where the backward comes to the chain."""


def _as_far_as_offered(modes: Sequence[Mode], operators: Sequence[Operator]) -> tuple[Mode, ...]:
    """The modes for operators that have changed: what an operator does not offer becomes its first mode."""
    if len(modes) != len(operators):
        return tuple(operator.modes[0] for operator in operators)
    pairs = zip(modes, operators, strict=True)
    return tuple(mode if mode in operator.modes else operator.modes[0] for mode, operator in pairs)


def find_chain(model: nn.Module) -> ReversibleChain:
    """The one chain that a model contains; chains inside its operators are parts of those.

    Raises UsageError where there is none, or several beside each other.
    """
    chains = list(dict.fromkeys(_outermost(model)))  # one may have several names
    if len(chains) != 1:
        found = "no ReversibleChain" if not chains else f"{len(chains)} chains beside each other"
        raise UsageError(f"{type(model).__name__} contains {found}: put the layers to be planned into one chain")
    return chains[0]


def apply(model: nn.Module, schedule: Schedule | Sequence[Mode | str]) -> None:
    """Switch the modes of the model's chain in place, from its next forward on."""
    find_chain(model).set_schedule(schedule.modes if isinstance(schedule, Schedule) else schedule)


def _outermost(module: nn.Module) -> Iterable[ReversibleChain]:
    if isinstance(module, ReversibleChain):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)

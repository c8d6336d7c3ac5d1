"""What an operator's forward ran under, and how to run the operator under the same again.

A replay must compute what the forward computed and must leave nothing changed: random numbers,
autocast, training flags and buffers are those of the forward while it runs, and what they were
before once it ends, also where it ends with an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revdist.errors import BoundaryModified, ReplayDiverged
from revdist.reversible.buffers import substitutes
from revdist.reversible.compiler import is_compiled
from revdist.reversible.notes import Notes
from revdist.reversible.statistics import BatchStatistics

if TYPE_CHECKING:
    from revdist.reversible.operator import Operator

_DRAWLESS = frozenset({
    nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Embedding,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Softplus, nn.Softmax, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample,
})  # fmt: skip
"""Modules of torch that never draw random numbers. Looking whether others did is dear between two kernels."""

Inputs = tuple[tuple[bool, torch.dtype, tuple[int, ...]], ...]
"""Per input of an operator: whether it requires grad, its type, and its strides."""

Slots = dict[str, nn.Parameter | None]
"""The parameters of one module, by name."""

AutocastState = tuple[tuple[str, bool, torch.dtype, bool], ...]
"""Per device type: its name, whether autocast is on, to which type, and whether casts are cached."""


_NO_STATISTICS = BatchStatistics(())


class Ambience:
    """Random state and autocast at one point of a forward; operators between which neither changed share one."""

    __slots__ = ("_device", "_random", "autocast")

    def __init__(self, device: torch.device, autocast: AutocastState | None = None) -> None:
        self._device = device
        self._random = _random_state(device)
        self.autocast = _autocast_state(device) if autocast is None else autocast

    def after(self, conditions: Conditions) -> Ambience:
        """What a forward left that has just ended: this very object where it drew nothing, so that no more is kept."""
        if not conditions.may_have_drawn() or _random_state(self._device) == self._random:
            return self
        return Ambience(self._device, self.autocast)

    def entered(self, *, random: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, autocast is as it was; if `random`, the present random state comes back afterwards."""
        casts = [cast for cast in self.autocast if cast[1] or torch.is_autocast_enabled(cast[0])]
        return self._entered(casts, random=random) if casts or random else contextlib.nullcontext()

    @contextlib.contextmanager
    def _entered(self, casts: Iterable[tuple[str, bool, torch.dtype, bool]], *, random: bool) -> Iterator[None]:
        present = _random_state(self._device) if random else ()
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype, cached in casts:
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cached))
            try:
                yield
            finally:
                if random:
                    _set_random_state(self._device, present)

    def rewind_random(self) -> None:
        """Set the random state to what it was."""
        _set_random_state(self._device, self._random)


class Conditions:
    """What one forward of one operator ran under. Created before the forward, closed after it."""

    __slots__ = (
        "_ambience", "_collectives", "_drew", "_flags", "_lost", "_modules", "_need_grad", "_notes", "_operator",
        "_parameters", "_places", "_slots", "_snapshots", "_statistics", "_versions",
    )  # fmt: skip

    def __init__(self, operator: Operator, ambience: Ambience) -> None:
        self._operator = operator
        self._ambience = ambience
        self._drew = True
        self._modules = _members(operator.module)
        self._flags = [member.training for member in self._modules]
        self._slots = [member._parameters.copy() for member in self._modules]
        self._parameters = [p for slots in self._slots for p in slots.values() if p is not None]
        self._need_grad = tuple([parameter.requires_grad for parameter in self._parameters])
        self._versions = [parameter._version for parameter in self._parameters]
        self._places: list[int] = []
        self._snapshots = operator.mutable_buffers.snapshot(self._modules)
        self._collectives = operator.communication.watch(training=self._flags[0])
        self._notes = Notes()
        self._lost = ""
        self._statistics: BatchStatistics | None = None

    @property
    def statistics(self) -> BatchStatistics:
        """What batch norms take in the forward; made when it is first asked for, since not every mode asks."""
        if self._statistics is None:
            pairs = zip(self._modules, self._flags, strict=True)
            self._statistics = BatchStatistics(module for module, training in pairs if training)
        return self._statistics

    def first_run(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the forward runs: what it decides with others or once and for all is kept."""
        notes = self._notes.taking()
        return notes if self._collectives is None else _both(notes, self._collectives)

    def key(self, inputs: Inputs) -> Hashable:
        """Forwards with the same key save the same tensors, as far as can be told before they run."""
        return inputs, tuple(self._flags), self._need_grad, self._ambience.autocast

    def may_have_drawn(self) -> bool:
        """Whether the forward may have drawn random numbers: False where it cannot have."""
        for module in self._modules:
            if type(module) not in _DRAWLESS or module._forward_hooks or module._forward_pre_hooks:
                return True
        return False

    @property
    def drew(self) -> bool:
        """Whether the forward, which has ended, drew random numbers."""
        return self._drew

    def is_compiled(self) -> bool:
        """Whether a part of the operator went through torch.compile."""
        return is_compiled(self._modules)

    def close(self, ambience: Ambience) -> None:
        """Note what the forward, which has just ended, changed."""
        self._drew = ambience is not self._ambience
        self._places = [parameter.data_ptr() for parameter in self._parameters]
        self._lost = self._operator.mutable_buffers.learn(self._snapshots, training=self._flags[0])
        self._operator.communication.learn(self._collectives, training=self._flags[0])

    def forget(self) -> None:
        """Drop every tensor that is kept for a replay, which is then impossible."""
        self._notes = Notes()
        self._snapshots = []
        self._collectives = None
        self._statistics = _NO_STATISTICS

    def owned_ids(self) -> set[int]:
        """Identities of the operator's parameters and buffers, as they were before the forward."""
        owned = set(map(id, self._parameters))
        owned.update([id(snapshot.buffer) for snapshot in self._snapshots])
        for member in self._modules:
            if member._buffers and isinstance(member, _NormBase):  # of which no snapshot is taken
                owned.update(map(id, member._buffers.values()))
        return owned

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, `another_run` as often as needed; afterwards everything is as it is now.

        Raises BoundaryModified where the values of a parameter have changed since the forward.
        """
        self._check()
        flags = [member.training for member in self._modules]
        need_grad = [parameter.requires_grad for parameter in self._parameters]
        swapped = self._swapped()
        buffers = [(member, dict(member._buffers)) for member in self._modules if member._buffers]
        with self._ambience.entered(random=self._drew):
            try:
                self._set_flags(self._flags)
                self._set_need_grad(self._need_grad)
                for member, slots, _ in swapped:
                    _replace(member._parameters, slots)
                yield
            finally:
                for member, _, slots in swapped:
                    _replace(member._parameters, slots)
                self._set_need_grad(need_grad)
                self._set_flags(flags)
                for member, named in buffers:
                    member._buffers.update(named)

    @contextlib.contextmanager
    def another_run(self) -> Iterator[Collection[Tensor | None]]:
        """Inside, the operator runs from where its forward started: random numbers, buffers, what it decided.

        Gives what stands in for buffers. It stays until the end, also where the run puts another buffer in its place:
        what it saves is told from buffers by identity.
        """
        if self._drew:
            self._ambience.rewind_random()
        stand_ins = substitutes(self._modules, self._snapshots, self.statistics.norms)
        for (member, name), buffer in stand_ins.items():
            member._buffers[name] = buffer
        if self._collectives is not None:
            self._collectives.rewind()
        with self._notes.reading(), self._collectives or contextlib.nullcontext():
            yield stand_ins.values()

    def _check(self) -> None:
        name = self._operator.name
        edited = any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True))
        if edited or any(p.data_ptr() != place for p, place in zip(self._parameters, self._places, strict=True)):
            raise BoundaryModified(
                f"a parameter of operator {name} was edited in place, or given other data, between its forward and its "
                "backward: step the optimizer after the backward"
            )
        if self._lost:
            raise ReplayDiverged(
                f"operator {name} wrote to its buffer {self._lost} for the first time, so this forward cannot be "
                "repeated: run the step again"
            )

    def _swapped(self) -> list[tuple[nn.Module, Slots, Slots]]:
        """Modules that have other parameters now: those of the forward, and those of now."""
        return [
            (member, slots, member._parameters.copy())
            for member, slots in zip(self._modules, self._slots, strict=True)
            if any(member._parameters.get(name) is not parameter for name, parameter in slots.items())
        ]

    def _set_need_grad(self, need_grad: Iterable[bool]) -> None:
        for parameter, needed in zip(self._parameters, need_grad, strict=True):
            if parameter.requires_grad is not needed:
                parameter.requires_grad_(needed)

    def _set_flags(self, flags: list[bool]) -> None:
        for member, training in zip(self._modules, flags, strict=True):
            if member.training is not training:
                member.training = training


@contextlib.contextmanager
def _both(
    notes: contextlib.AbstractContextManager[None], collectives: contextlib.AbstractContextManager[Any]
) -> Iterator[None]:
    with notes, collectives:
        yield


def _replace(slots: Slots, others: Slots) -> None:
    slots.clear()
    slots.update(others)


def _members(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once; `Module.modules` makes a name for each and takes much longer."""
    members = {module: None}
    pending = [module]
    while pending:
        children = pending.pop()._modules
        if children:
            for child in children.values():
                if child is not None and child not in members:
                    members[child] = None
                    pending.append(child)
    return list(members)


def _random_state(device: torch.device) -> tuple[bytes, ...]:
    """As bytes: quick to compare, and not on the books of a CPU device."""
    host = torch.default_generator.get_state().numpy().tobytes()
    if device.type != "cuda":
        return (host,)
    return host, torch.cuda.get_rng_state(device).numpy().tobytes()


def _set_random_state(device: torch.device, states: tuple[bytes, ...]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(states[0]), dtype=torch.uint8))
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(states[1]), dtype=torch.uint8), device)


def _autocast_state(device: torch.device) -> AutocastState:
    cached = torch.is_autocast_cache_enabled()
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached)
        for kind in dict.fromkeys((device.type, "cpu"))
    )

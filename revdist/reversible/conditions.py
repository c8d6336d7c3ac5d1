"""What an operator's forward ran under, and how to run the operator under the same again.

A replay must compute what the forward computed and must leave nothing changed: random numbers,
autocast, training flags and buffers are those of the forward while it runs, and what they were
before once it ends, also where it ends with an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from revdist.errors import BoundaryModified, ReplayDiverged
from revdist.reversible.buffers import MutableBuffers, substitutes
from revdist.reversible.notes import Notes

AutocastState = tuple[tuple[str, bool, torch.dtype, bool], ...]
"""Per device type: its name, whether autocast is on, to which type, and whether casts are cached."""


class Ambience:
    """Random state and autocast at one point of a forward; operators between which neither changed share one."""

    __slots__ = ("_autocast", "_device", "_random")

    def __init__(self, device: torch.device, autocast: AutocastState | None = None) -> None:
        self._device = device
        self._random = _random_state(device)
        self._autocast = _autocast_state(device) if autocast is None else autocast

    def now(self) -> Ambience:
        """The present random state: this very object where nobody drew, so that nothing more is kept."""
        present = Ambience(self._device, self._autocast)
        return self if present._random == self._random else present

    def enter(self, stack: contextlib.ExitStack, *, random: bool) -> None:
        """Autocast as it was until the stack unwinds; if `random`, the present random state comes back then."""
        for device_type, enabled, dtype, cached in self._autocast:
            if enabled or torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cached))
        if random:
            stack.callback(_set_random_state, self._device, _random_state(self._device))

    def rewind_random(self) -> None:
        """Set the random state to what it was."""
        _set_random_state(self._device, self._random)


class Conditions:
    """What one forward of one operator ran under. Created before the forward, closed after it."""

    __slots__ = (
        "_ambience", "_drew", "_flags", "_lost", "_modules", "_name", "_parameters", "_snapshots", "_versions", "notes",
    )  # fmt: skip

    def __init__(self, name: str, module: nn.Module, ambience: Ambience, buffers: MutableBuffers) -> None:
        self._name = name
        self._ambience = ambience
        self._drew = True
        self._modules = _members(module)
        self._flags = [member.training for member in self._modules]
        self._parameters = [p for member in self._modules for p in member._parameters.values() if p is not None]
        self._versions = [parameter._version for parameter in self._parameters]
        self._snapshots = buffers.snapshot(self._modules)
        self._lost = ""
        self.notes = Notes()
        """What the forward decided once and for all."""

    def close(self, ambience: Ambience, buffers: MutableBuffers) -> None:
        """Note what the forward, which has just ended, changed."""
        self._drew = ambience is not self._ambience
        self._lost = buffers.learn(self._snapshots, training=self._flags[0])

    def forget(self) -> None:
        """Drop every tensor that is kept for a replay, which is then impossible."""
        self.notes = Notes()
        self._snapshots = []

    def owned_ids(self) -> set[int]:
        """Identities of the operator's parameters, and of its buffers as they are now."""
        owned = {id(buffer) for member in self._modules for buffer in member._buffers.values()}
        owned.update(map(id, self._parameters))
        return owned

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, `rewind` and run the operator as often as needed; afterwards everything is as it is now.

        Raises BoundaryModified where a parameter has been edited since the forward.
        """
        self._check()
        with contextlib.ExitStack() as stack:
            self._ambience.enter(stack, random=self._drew)
            stack.callback(self._set_flags, [member.training for member in self._modules])
            self._set_flags(self._flags)
            stack.callback(self._set_buffers, [dict(member._buffers) for member in self._modules])
            yield

    def rewind(self) -> None:
        """Go back to where the forward started: its random numbers, and buffers that may be written to."""
        if self._drew:
            self._ambience.rewind_random()
        for (member, name), buffer in substitutes(self._modules, self._snapshots).items():
            member._buffers[name] = buffer

    def _check(self) -> None:
        if any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True)):
            raise BoundaryModified(
                f"a parameter of operator {self._name} was edited in place between its forward and its backward: "
                "step the optimizer after the backward"
            )
        if self._lost:
            raise ReplayDiverged(
                f"operator {self._name} wrote to its buffer {self._lost} for the first time, so this forward cannot be "
                "repeated: run the step again"
            )

    def _set_flags(self, flags: list[bool]) -> None:
        for member, training in zip(self._modules, flags, strict=True):
            if member.training is not training:
                member.training = training

    def _set_buffers(self, buffers: list[dict[str, Tensor | None]]) -> None:
        for member, named in zip(self._modules, buffers, strict=True):
            member._buffers.update(named)


def _members(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once; `Module.modules` makes a name for each and takes much longer."""
    members = {module: None}
    pending = [module]
    while pending:
        for child in pending.pop()._modules.values():
            if child is not None and child not in members:
                members[child] = None
                pending.append(child)
    return list(members)


def _random_state(device: torch.device) -> tuple[bytes, ...]:
    """As bytes: quick to compare, and not on the books of a CPU device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)


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

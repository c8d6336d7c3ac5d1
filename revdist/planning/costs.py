"""The vocabulary of planning: modes, options, profiles, schedules and plans, all frozen values.

Bytes are integers and seconds are floats everywhere. Each value round-trips through JSON with
`to_json` and `from_json`; reading refuses what is not a cost (`InvalidCosts`).

The model (Jiang et al., ECCV 2020, made exact with prefix sums): with option c_i chosen for
operator i = 1..n,

    need = outside + max_i ( sum_{j<=i} w_j + t_i )

where w_j is what operator j holds between its forward and its backward and t_i is the most that
operator i needs on top while it runs itself. Both depend on what the operator before does with its
output, this one's input: whether it holds it, asks for it back (INVERT), or neither.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from revdist.errors import InvalidCosts

T = TypeVar("T")

_PER_OPERATOR = ("operator_names", "reconstruction_error", "error_growth")
"""Fields of a profile with an entry for each operator, or none at all."""

MAX_BYTES = 2**62
"""Largest byte count accepted: sums over a chain must stay within 64-bit integers."""


class Mode(enum.StrEnum):
    """How an operator's backward gets what it needs."""

    SAVE = "SAVE"
    INVERT = "INVERT"
    RECOMPUTE = "RECOMPUTE"
    OFFLOAD = "OFFLOAD"

    @property
    def letter(self) -> str:
        """One letter for strips and tables: S, I, R or O."""
        return self.value[0]


class Before(enum.IntEnum):
    """What the operator before does with its output, the input of this one."""

    KEEPS = 0
    """Nothing: it keeps its own input or gets it from the host; nor does what comes before the first operator."""
    HOLDS = 1
    """It holds it until its backward."""
    INVERTS = 2
    """It asks for it, to invert."""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One mode of one operator with its measured cost."""

    mode: Mode
    held_bytes: int
    """Bytes that stay from its forward until its backward, where the operator before does not hold its output."""
    working_bytes: int
    """Most bytes needed on top while the operator's own forward or backward runs, whatever the operator before does."""
    extra_s: float
    """Seconds of step time over the operator's fastest option."""
    shared_bytes: int = 0
    """Part of `held_bytes` that is the operator's input: free where the operator before holds its output."""
    holds_output: bool = False
    """Whether the operator's output is among what it holds, so that the next operator's `shared_bytes` are free."""
    handed_bytes: int = 0
    """Part of `working_bytes` that is needed only where the operator before inverts: its output is handed to it."""
    spared_bytes: int = 0
    """Part of the rest that is not needed where the operator before holds its output."""

    def __post_init__(self) -> None:
        if not isinstance(self.mode, Mode):
            try:
                object.__setattr__(self, "mode", Mode(self.mode))
            except ValueError:
                raise InvalidCosts(f"mode {self.mode!r} is not one of {', '.join(Mode)}") from None
        for name in ("held_bytes", "working_bytes", "shared_bytes", "handed_bytes", "spared_bytes"):
            _check_bytes(name, getattr(self, name))
        if self.shared_bytes > self.held_bytes:
            raise InvalidCosts(
                f"shared_bytes {self.shared_bytes} exceeds held_bytes {self.held_bytes}: it is a part of it"
            )
        if self.handed_bytes + self.spared_bytes > self.working_bytes:
            raise InvalidCosts(
                f"handed_bytes {self.handed_bytes} and spared_bytes {self.spared_bytes} exceed working_bytes "
                f"{self.working_bytes}: they are parts of it"
            )
        _check_seconds("extra_s", self.extra_s)
        if not isinstance(self.holds_output, bool):
            raise InvalidCosts(f"holds_output must be true or false, not {self.holds_output!r}")

    @property
    def working_by_before(self) -> dict[Before, int]:
        """Bytes needed on top, by what the operator before does."""
        kept = self.working_bytes - self.handed_bytes
        return {Before.KEEPS: kept, Before.HOLDS: kept - self.spared_bytes, Before.INVERTS: self.working_bytes}

    def needing(self, working: Mapping[Before, int]) -> Self:
        """This option with bytes needed on top, by what the operator before does.

        Holding spares bytes and inverting asks for more: where it seems to be the other way, or one of them is not
        known, all count as the larger.
        """
        most = max(working.values())
        kept = working.get(Before.KEEPS, most)
        held = working.get(Before.HOLDS, kept)
        kept = max(kept, held)
        return dataclasses.replace(
            self,
            working_bytes=max(kept, working.get(Before.INVERTS, most)),
            handed_bytes=max(0, working.get(Before.INVERTS, most) - kept),
            spared_bytes=kept - held,
        )

    @property
    def does(self) -> Before:
        """What the next operator finds."""
        if self.holds_output:
            return Before.HOLDS
        return Before.INVERTS if self.mode is Mode.INVERT else Before.KEEPS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The measured options of every operator, on one device, at one micro-batch size."""

    options: tuple[tuple[Option, ...], ...]
    """Per operator, in chain order: its options, one per mode."""
    operator_names: tuple[str, ...] = ()
    """Per operator: its name in the model. Empty: operators are numbered."""
    micro_batch: int = 1
    """Samples in the measured micro-batch."""
    base_s: float = 0.0
    """Seconds of one micro-batch (forward and backward) with every operator's fastest option."""
    outside_bytes: int = 0
    """Bytes that layers outside the chain hold through the whole step, the batch itself included."""
    fixed_bytes: int = 0
    """Bytes that do not depend on the schedule or the batch: parameters, gradients, buffers, optimizer state."""
    step_peak_bytes: int = 0
    """Most bytes the optimizer step needs on top of `fixed_bytes`."""
    reconstruction_error: tuple[float, ...] = ()
    """Per operator: relative L2 error of its input rebuilt from its exact output. Empty: not measured."""
    error_growth: tuple[float, ...] = ()
    """Per operator: by how much an error of its output grows in its rebuilt input. Empty: not measured, taken as 1."""
    device: str = ""
    """UUID or name of the device measured."""
    key: str = ""
    """What the profile holds for: model, device type, micro-batch and versions, hashed. Empty: built from numbers."""

    def __post_init__(self) -> None:
        if not self.options:
            raise InvalidCosts("a profile needs at least one operator: the chain is empty")
        for index, options in enumerate(self.options):
            _check_operator(index, options)
        for name in ("outside_bytes", "fixed_bytes", "step_peak_bytes"):
            _check_bytes(name, getattr(self, name))
        total = self.outside_bytes + sum(max(o.held_bytes + o.working_bytes for o in ops) for ops in self.options)
        if total > MAX_BYTES:
            raise InvalidCosts(f"the profile adds up to {total} bytes, over the limit of {MAX_BYTES}")
        _check_seconds("base_s", self.base_s)
        slowest_s = self.base_s + sum(max(option.extra_s for option in choices) for choices in self.options)
        _check_seconds("the sum of base_s and every extra_s", slowest_s)
        _check_count("micro_batch", self.micro_batch)
        for name in _PER_OPERATOR:
            values = getattr(self, name)
            if values and len(values) != len(self.options):
                raise InvalidCosts(f"{name} has {len(values)} entries for {len(self.options)} operators")
        for text in (*self.operator_names, self.device, self.key):
            _check_text("operator_names, device and key", text)
        for error in (*self.reconstruction_error, *self.error_growth):
            _check_error("reconstruction_error and error_growth", error)

    @classmethod
    def from_options(cls, options: Iterable[Iterable[Option]], **fields: Any) -> Self:
        """Build a profile from numbers alone, without torch or a device.

        Raises InvalidCosts for an empty chain, an operator without options, duplicated modes and
        negative, non-finite or overflowing costs.
        """
        for name in fields.keys() & _PER_OPERATOR:
            fields[name] = tuple(fields[name])
        return cls(options=tuple(tuple(choices) for choices in options), **fields)

    @property
    def num_operators(self) -> int:
        return len(self.options)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = _load_object(text, cls)
        fields["options"] = tuple(
            tuple(_build(Option, option) for option in _list("options", choices))
            for choices in _list("options", fields.get("options"))
        )
        for name in _PER_OPERATOR:
            if name in fields:
                fields[name] = tuple(_list(name, fields[name]))
        return _build(cls, fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One mode per operator, with what it is predicted to cost."""

    modes: tuple[Mode, ...]
    extra_s: float = 0.0
    """Seconds of one micro-batch over the fastest schedule."""
    need_bytes: int = 0
    """Peak bytes of one micro-batch, `outside_bytes` included, `fixed_bytes` not."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "modes", tuple(Mode(mode) for mode in self.modes))
        except ValueError as error:
            raise InvalidCosts(str(error)) from None
        _check_seconds("extra_s", self.extra_s)
        _check_bytes("need_bytes", self.need_bytes)

    @property
    def strip(self) -> str:
        """The modes as letters, `SSIIR`."""
        return "".join(mode.letter for mode in self.modes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = _load_object(text, cls)
        fields["modes"] = tuple(_list("modes", fields.get("modes")))
        return _build(cls, fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one replica runs."""

    generation: int
    """Counts adopted cluster plans; shares change only with it."""
    rank: int
    device: str
    """UUID of the device."""
    share: int
    """Samples of every global batch that this replica processes."""
    micro_batch: int
    """Samples per forward and backward; the last one of a step may be smaller."""
    accumulation_steps: int
    """Micro-batches per step: ceil(share / micro_batch)."""
    schedule: Schedule
    budget_bytes: int
    predicted_step_s: float
    predicted_peak_bytes: int
    """Predicted peak of the device memory this replica uses, `fixed_bytes` included."""
    reason: str = "start"
    """Why the plan was adopted: start, memory-lost, memory-gained, share, joined, lost, profile."""

    def __post_init__(self) -> None:
        for name in ("generation", "rank", "share", "accumulation_steps", "budget_bytes", "predicted_peak_bytes"):
            _check_bytes(name, getattr(self, name))
        _check_count("micro_batch", self.micro_batch)
        _check_seconds("predicted_step_s", self.predicted_step_s)
        for name in ("device", "reason"):
            _check_text(name, getattr(self, name))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = _load_object(text, cls)
        fields["schedule"] = Schedule.from_json(json.dumps(fields.get("schedule")))
        return _build(cls, fields)


def _check_operator(index: int, options: Sequence[Option]) -> None:
    if not options:
        raise InvalidCosts(f"operator {index} has no options: give it at least one mode")
    modes = [option.mode for option in options]
    if len(set(modes)) != len(modes):
        raise InvalidCosts(f"operator {index} lists a mode twice: {', '.join(modes)}")
    if modes != [mode for mode in Mode if mode in modes]:
        raise InvalidCosts(f"operator {index} lists its modes as {', '.join(modes)}: sort them as {', '.join(Mode)}")


def _check_bytes(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidCosts(f"{name} must be an integer, not {value!r}")
    if not 0 <= value <= MAX_BYTES:
        raise InvalidCosts(f"{name} is {value}: it must lie between 0 and {MAX_BYTES}")


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidCosts(f"{name} must be a number of seconds, not {value!r}")
    if not 0 <= value <= sys.float_info.max:  # NaN compares false; integers may exceed any float
        raise InvalidCosts(f"{name} is {value}: it must be finite and not negative")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidCosts(f"{name} must be a positive integer, not {value!r}")


def _check_error(name: str, value: Any) -> None:
    """An error may be infinite, or not a number where the rebuilt activations are not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise InvalidCosts(f"{name} must be numbers that are not negative, not {value!r}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidCosts(f"{name} must be text, not {value!r}")


def _load_object(text: str, cls: type) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCosts(f"not JSON for a {cls.__name__}: {error}") from None
    if not isinstance(value, dict):
        raise InvalidCosts(f"JSON for a {cls.__name__} must be an object, not {type(value).__name__}")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidCosts(f"{name} must be a list, not {type(value).__name__}")
    return value


def _build(cls: type[T], fields: Any) -> T:
    if not isinstance(fields, dict):
        raise InvalidCosts(f"JSON for a {cls.__name__} must be an object, not {type(fields).__name__}")
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InvalidCosts(f"a {cls.__name__} has no field {unknown[0]!r}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise InvalidCosts(f"cannot read a {cls.__name__}: {error}") from None

"""What a run is: typed, strict, and the same whether it comes from YAML, the command line or Python.

Unknown keys are refused with the nearest valid one; sizes read `48MiB` or plain bytes. Reading a
configuration imports nothing that it names: factories (`package.module:name`) are imported when
the run starts.
"""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic

from revdist.config_text import override, read_mapping, to_yaml
from revdist.errors import ConfigError
from revdist.sizes import parse_bytes as parse_bytes

Bytes = Annotated[int, pydantic.BeforeValidator(parse_bytes), pydantic.Field(ge=0)]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Factory = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]

_SGD = "torch.optim:SGD"
_SGD_KWARGS = {"lr": 0.1, "momentum": 0.9}


class Section(pydantic.BaseModel):
    """Base of every part of a configuration: frozen, and without room for unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Called(Section):
    """Something the run builds by calling a factory."""

    factory: Factory
    kwargs: dict[str, Any] = {}


class OptimizerConfig(Called):
    factory: Factory = _SGD
    kwargs: dict[str, Any] = pydantic.Field({}, validate_default=True)
    """Of SGD, a key that is not given is that of `_SGD_KWARGS`; other factories have defaults of their own."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate over the run, after `warmup_steps` of linear warm-up."""
    warmup_steps: int = pydantic.Field(0, ge=0)
    clip_norm: float | None = pydantic.Field(None, gt=0)
    """Largest gradient norm of the whole batch; none: not clipped."""

    @pydantic.field_validator("kwargs")
    @classmethod
    def _complete(cls, kwargs: dict[str, Any], others: pydantic.ValidationInfo) -> dict[str, Any]:
        return {**_SGD_KWARGS, **kwargs} if others.data.get("factory") == _SGD else kwargs


class DeviceSpec(Section):
    """One device a replica runs on."""

    kind: Literal["cpu", "cuda"]
    name: str = ""
    """CPU: the name of the device on its host, `cpu-0` by default."""
    capacity: Bytes | None = None
    """CPU: bytes the device has. CUDA devices have what they have."""
    uuid: str = ""
    """CUDA: UUID (GPU-... or MIG-...) as `revdist devices` prints it. Empty: any free one."""


Devices = Literal["auto"] | tuple[DeviceSpec, ...]


class WorkersConfig(Section):
    """How many replicas a run may have."""

    min: int = pydantic.Field(1, ge=1)
    max: int | None = pydantic.Field(None, ge=1)
    max_restarts: int = pydantic.Field(3, ge=0)
    """Lost replicas that are replaced, and starts of all from the last checkpoint, over the whole run."""

    @pydantic.model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}: lower min, or raise max")
        return self


class FaultsConfig(Section):
    """When a replica, or the Ray head, counts as lost."""

    heartbeat_s: float = pydantic.Field(5.0, gt=0)
    """Seconds without an answer after which a replica is given up: frozen, or its host or network is gone."""
    head_s: float | None = pydantic.Field(None, gt=0)
    """Seconds for which the Ray head may be away before the run saves and leaves; none: half of Ray's own patience."""


class MemoryConfig(Section):
    """How much of a device's memory a run leaves alone."""

    margin: Bytes = 2**20
    """Bytes never planned for."""
    fragmentation: float = pydantic.Field(0.02, ge=0, lt=1)
    """Share of the free memory written off to fragmentation."""
    budget: Bytes | None = None
    """Upper limit of the activation budget of every device; none: what is free."""


class PlanningConfig(Section):
    """What the planner may choose."""

    schedule: Literal["auto", "save", "invert"] = "auto"
    """auto: the frontier's best; save or invert: that mode on every operator that has it."""
    share: Literal["auto", "equal"] = "auto"
    modes: tuple[Literal["SAVE", "INVERT", "RECOMPUTE", "OFFLOAD"], ...] = pydantic.Field(
        ("SAVE", "INVERT", "RECOMPUTE"), min_length=1
    )
    micro_batches: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = ()
    """Micro-batch sizes to profile; empty: chosen from the share and the memory."""
    guarantee: float = pydantic.Field(0.01, ge=0)
    """Largest relative extra time over the optimum where the exact frontier would be too large."""
    profile_repeats: int = pydantic.Field(5, ge=1)
    profile_cache: bool = True
    profile_first: bool = False
    """Measure a model that was never seen before the first step; else between the first steps."""
    max_reconstruction_error: float | None = pydantic.Field(None, gt=0)
    """Largest relative error of an activation rebuilt by INVERT; none: not limited."""


class ReplanConfig(Section):
    """When a new memory reading changes the plan."""

    every_s: float = pydantic.Field(0.5, gt=0)
    """Seconds between readings."""
    min_change: float = pydantic.Field(0.05, ge=0)
    """Relative gain of budget below which the plan is kept, and part of the step time that new shares must save."""
    settle_s: float = pydantic.Field(1.0, ge=0)
    """Seconds for which more memory must stay free before it is used, or a device be slower before shares change."""
    shares: bool = True
    """Whether shares may change during the run."""


class CheckpointConfig(Section):
    """When and where training state is saved."""

    every_steps: int | None = pydantic.Field(None, ge=1)
    """Steps between checkpoints; none: at the end and on preemption."""
    every_s: float | None = pydantic.Field(None, gt=0)
    """Seconds after which there is a checkpoint at the next step boundary; none: not by time."""
    keep: int = pydantic.Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every_steps: int | None = pydantic.Field(None, ge=1)
    """Checkpoints at multiples of so many steps are never removed; none: only the newest stay."""
    location: str = ""
    """Directory or fsspec URL, for this run alone; empty: `checkpoints/` in the run directory.

    A directory becomes an absolute path, so that it is the same for every process of the run and its resume.
    """

    @pydantic.field_validator("location")
    @classmethod
    def _from_anywhere(cls, location: str) -> str:
        if not location or "://" in location:
            return location
        try:
            return str(Path(location).expanduser().absolute())
        except RuntimeError:
            raise ValueError("there is no such home directory: give an absolute path") from None


class CoTenantConfig(Section):
    """A rehearsal: another process takes memory of a device while the run trains, and gives it back."""

    device: str
    """Name of the CPU device, `cpu-0`."""
    take: Bytes
    from_step: int = pydantic.Field(ge=0)
    to_step: int = pydantic.Field(ge=0)

    @pydantic.field_validator("to_step")
    @classmethod
    def _is_not_before_it_began(cls, to_step: int, info: pydantic.ValidationInfo) -> int:
        from_step = info.data.get("from_step", 0)
        if to_step < from_step:
            raise ValueError(f"memory is given back after it was taken: not below from_step, {from_step}")
        return to_step


class RunConfig(Section):
    """A whole run."""

    name: str = pydantic.Field("run", pattern=f"^{_NAME}$")
    model: Called
    data: Called
    """Factory of `(train, test)`, two map-style datasets of `(input, target)`; test may be None."""
    loss: Factory = "torch.nn.functional:cross_entropy"
    """Called as `loss(output, target, reduction="sum")`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    global_batch: int = pydantic.Field(ge=1)
    """Samples per optimizer step over all replicas."""
    micro_batch: int | None = pydantic.Field(None, ge=1)
    """Most samples of a forward and backward on every device; a share is cut evenly. None: planned per device."""
    epochs: int | None = pydantic.Field(None, ge=1)
    steps: int | None = pydantic.Field(None, ge=1)
    seed: int = pydantic.Field(0, ge=0, lt=2**64)
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss that is not finite does: ends the run, or leaves the step out, at most ten times in a row."""
    precision: Literal["fp64", "fp32", "bf16"] = "fp32"
    """bf16: autocast over an fp32 stream."""
    devices: Devices = "auto"
    """auto: every free GPU of the cluster, else one CPU device per node."""
    workers: WorkersConfig = WorkersConfig()
    threads_per_worker: int = pydantic.Field(1, ge=1)
    faults: FaultsConfig = FaultsConfig()
    memory: MemoryConfig = MemoryConfig()
    planning: PlanningConfig = PlanningConfig()
    replan: ReplanConfig = ReplanConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    co_tenants: tuple[CoTenantConfig, ...] = ()
    tensorboard: bool = True
    evaluate: bool = True
    """Whether the test data are scored at the end."""

    @pydantic.field_validator("devices")
    @classmethod
    def _are_of_one_kind(cls, devices: Devices) -> Devices:
        kinds = [] if devices == "auto" else [spec.kind for spec in devices]
        if len(set(kinds)) > 1:
            raise ValueError(
                f"{kinds.count('cpu')} of kind cpu and {kinds.count('cuda')} of kind cuda cannot form one group, "
                "since NCCL connects GPUs and gloo CPUs: list devices of one kind"
            )
        return devices

    @pydantic.model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            example = "epochs=12 or steps=1000"
            if self.steps is not None:
                example = f"epochs=null steps={self.steps}, or steps=null"
            raise ValueError(f"give the length of the run once, either epochs or steps: for example {example}")
        return self

    @pydantic.field_validator("devices")
    @classmethod
    def _has_a_device(
        cls, devices: Literal["auto"] | tuple[DeviceSpec, ...]
    ) -> Literal["auto"] | tuple[DeviceSpec, ...]:
        if not devices:
            raise ValueError("the list needs one device at least, or auto takes those that are free")
        return devices

    @pydantic.model_validator(mode="after")
    def _has_the_devices_of_its_co_tenants(self) -> Self:
        if self.devices == "auto":
            return self
        names = _cpu_names(self.devices)
        for number, co_tenant in enumerate(self.co_tenants):
            if co_tenant.device not in names:
                there = f"only on {', '.join(sorted(names))}" if names else "nor on any other CPU device"
                raise ValueError(
                    f"co_tenants.{number}.device: no replica runs on {co_tenant.device!r}, {there}: "
                    "change it, or do without them by co_tenants=[]"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _can_have_its_workers(self) -> Self:
        wanted = self.workers.min
        if self.devices != "auto" and wanted > len(self.devices):
            raise ValueError(
                f"workers.min is {wanted} and {len(self.devices)} devices are listed: "
                "lower workers.min, or list more devices"
            )
        if wanted > self.global_batch:
            raise ValueError(
                f"workers.min is {wanted} and global_batch {self.global_batch}, less than a sample for each: "
                "lower workers.min, or raise global_batch"
            )
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Check and complete a nested mapping.

        Raises ConfigError naming the key, its value and, for an unknown key, the nearest valid one.
        """
        try:
            return cls.model_validate(values)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{source}: {_explain(error.errors(), cls)}") from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file, then apply `key.sub=value` overrides, values being YAML."""
        path = Path(path)
        values = read_mapping(path)
        for text in overrides:
            override(values, text)
        if "name" not in values:
            values["name"] = _name_from(path)
        return cls.from_mapping(values, source=str(path))

    def to_yaml(self) -> str:
        """The resolved configuration; `from_yaml` reads it back to an equal one."""
        return to_yaml(self.model_dump(mode="json"))


def _name_from(path: Path) -> str:
    """The name of a run whose file gives none."""
    if not re.fullmatch(_NAME, path.stem):
        raise ConfigError(
            f"{path} gives the run no name, and its own, {path.stem!r}, cannot be one: set one of letters, digits, "
            "'.', '_' and '-', a letter or digit first, say name=run"
        )
    return path.stem


def _cpu_names(devices: Sequence[DeviceSpec]) -> set[str]:
    """Names that CPU devices of a list may have: those without one become cpu-0, cpu-1, ... on their hosts."""
    given = [device.name for device in devices if device.kind == "cpu"]
    unnamed = {f"cpu-{number}" for number in range(len(given))} if "" in given else set()
    return unnamed | {name for name in given if name}


def _explain(errors: list[Any], root: type[pydantic.BaseModel]) -> str:
    lines = []
    for error in errors:
        location = [part for part in error["loc"] if not _is_union_tag(part)]
        if error["type"] == "literal_error" and any(_is_below(other["loc"], location) for other in errors):
            continue  # the other arm of the union says what is wrong
        key = ".".join(str(part) for part in location)
        if error["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{_nearest(location, root)}")
        elif error["type"] == "missing":
            lines.append(f"key {key!r} is missing")
        else:
            message = error["msg"].removeprefix("Value error, ")
            # What is wrong between keys of the whole names their values itself.
            lines.append(f"{key}: {message} (got {error['input']!r})" if key else message)
    return "; ".join(dict.fromkeys(lines))


def _is_below(other: Sequence[Any], location: list[Any]) -> bool:
    parts = [part for part in other if not _is_union_tag(part)]
    return len(parts) > len(location) and parts[: len(location)] == location


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part.startswith("literal"))


def _nearest(location: list[Any], root: type[pydantic.BaseModel]) -> str:
    section: type[pydantic.BaseModel] | None = root
    for part in location[:-1]:
        if isinstance(part, int) or section is None:
            continue
        field = section.model_fields.get(str(part))
        section = _section_of(field.annotation) if field else None
    if section is None:
        return ""
    valid = list(section.model_fields)
    match = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.0)
    return f": did you mean {match[0]!r}?" if match else f": valid keys are {', '.join(valid)}"


def _section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    if inspect.isclass(annotation):
        return annotation if issubclass(annotation, pydantic.BaseModel) else None
    for argument in typing.get_args(annotation):
        found = _section_of(argument)
        if found is not None:
            return found
    return None

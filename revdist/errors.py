"""Every error revdist raises on purpose, as one tree.

    RevdistError                      base: message, keyword facts as attributes, `exit_code`
    ├── UsageError (ValueError)       the caller asked for something that cannot be; exit code 2
    │   ├── ConfigError               a configuration key or value
    │   ├── BudgetTooSmall            no schedule fits: budget_bytes, minimum_bytes, missing_bytes
    │   ├── OutOfDeviceMemory         memory ran out where there is no smaller plan, or none yet
    │   ├── AccuracyUnreachable       no schedule is as accurate as asked: operator, error, limit
    │   ├── InvalidCosts              options or profiles that are not costs
    │   ├── FactoryError              a model, data, loss or optimizer factory that cannot be imported or called
    │   ├── DataMissing               data that is not there
    │   ├── BatchTooSmall             a global batch smaller than the number of replicas
    │   ├── NoFreeDevice              nothing to train on
    │   └── AddressUnreachable        nothing listens there
    ├── DeviceError                   a device cannot be read
    │   ├── DriverMissing             no NVML library
    │   ├── DriverMismatch            library and kernel module differ
    │   ├── DeviceNotFound            no device with that UUID or name
    │   ├── DeviceLost                fell off the bus, or an Xid says so
    │   └── NotSupportedByDevice      the device does not offer that reading
    ├── ReversibleError               reversible execution refused to continue
    │   ├── BoundaryModified          an activation was edited in place after the forward
    │   ├── ReplayDiverged            a replay saved other tensors than the forward did
    │   └── NotInvertible             an inverse that does not invert
    ├── CheckpointError               a checkpoint that cannot be written or read
    └── RunFailed                     a run ended: rank, host, cause, remedy
        ├── NonFiniteLoss             step, rank and sample ids
        └── Preempted                 saved and left on a signal; exit code 143

Errors cross process borders through Ray, so each one pickles with its facts.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RevdistError(Exception):
    """Base of the tree. Keyword facts become attributes and survive pickling."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[RevdistError], message: str, facts: dict[str, Any]) -> RevdistError:
    error = cls.__new__(cls)
    RevdistError.__init__(error, message, **facts)
    return error


class UsageError(RevdistError, ValueError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong; nothing was started."""


class BudgetTooSmall(UsageError):
    """No schedule fits the budget. Says how much is missing."""

    budget_bytes: int
    minimum_bytes: int
    missing_bytes: int

    def __init__(self, budget_bytes: int, minimum_bytes: int, *, where: str = "", remedy: str = "") -> None:
        missing = minimum_bytes - budget_bytes
        place = f" on {where}" if where else ""
        advice = remedy or f"lower micro_batch or free {format_bytes(missing)}"
        super().__init__(
            f"budget {format_bytes(budget_bytes)} is below the smallest possible plan, "
            f"{format_bytes(minimum_bytes)}{place}: {format_bytes(missing)} missing; {advice}",
            budget_bytes=budget_bytes,
            minimum_bytes=minimum_bytes,
            missing_bytes=missing,
        )


class OutOfDeviceMemory(UsageError):
    """A device ran out of memory where there is no smaller plan to try, or none is known yet."""


class AccuracyUnreachable(UsageError):
    """No schedule keeps the error of rebuilt activations within the limit."""

    operator: str
    error: float
    limit: float


class InvalidCosts(UsageError):
    """Options or profiles that are not costs: negative, not finite, too large, duplicated or empty."""


class FactoryError(UsageError):
    """A `package.module:name` in the configuration cannot be imported or called."""


class DataMissing(UsageError):
    """The data a run names are not there."""


class BatchTooSmall(UsageError):
    """The global batch gives some replica no sample."""


class NoFreeDevice(UsageError):
    """No device is free to train on."""


class AddressUnreachable(UsageError):
    """Nothing that speaks Ray listens at the address."""


class DeviceError(RevdistError):
    """A device cannot be read or used."""


class DriverMissing(DeviceError):
    """The NVML library is not installed, or its driver is not loaded."""


class DriverMismatch(DeviceError):
    """The NVML library and the kernel driver have different versions."""


class DeviceNotFound(DeviceError):
    """No device has that UUID or name."""


class DeviceLost(DeviceError):
    """The device fell off the bus or reported an error it does not recover from."""


class NotSupportedByDevice(DeviceError):
    """The device does not offer that reading."""


class ReversibleError(RevdistError, RuntimeError):
    """Reversible execution refused to continue rather than return a wrong gradient."""


class BoundaryModified(ReversibleError):
    """An activation that the backward needs was edited in place after the forward."""


class ReplayDiverged(ReversibleError):
    """Running an operator again saved other tensors than its forward did."""


class NotInvertible(ReversibleError):
    """An operator's inverse does not give its input back."""


class CheckpointError(RevdistError):
    """A checkpoint cannot be written or read."""


class RunFailed(RevdistError):
    """A run ended before its work was done."""


class NonFiniteLoss(RunFailed):
    """The loss is not a finite number."""


class Preempted(RunFailed):
    """The run saved its state and left on a signal."""

    exit_code = 143


def format_bytes(num_bytes: int) -> str:
    """Bytes as people read them: `1.5 GiB`, `48.0 MiB`, `512 B`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")

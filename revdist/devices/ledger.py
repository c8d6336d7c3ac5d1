"""The ledger file of a CPU device: how much it has, and which process holds how much of it.

The layout is native/ledger.h's. Python creates ledgers, reads them and gives slots to processes; the
native allocator changes a slot's bytes. Files lie in `$REVDIST_DEVICES_DIR`, by default a folder of
this user's in /dev/shm, one `<name>.ledger` a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from revdist.devices import host
from revdist.devices.reading import Holder
from revdist.errors import DeviceError, DeviceNotFound, UsageError, format_bytes

MAGIC = 0x5245474445564552
VERSION = 1
NUM_SLOTS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


class _Slot(ctypes.Structure):
    _fields_ = [
        ("owner", ctypes.c_uint64),
        ("pid_namespace", ctypes.c_uint64),
        ("current_bytes", ctypes.c_uint64),
        ("peak_bytes", ctypes.c_uint64),
        ("unenforced", ctypes.c_uint64),
        ("name", ctypes.c_char * 88),
    ]


class _File(ctypes.Structure):
    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("version", ctypes.c_uint32),
        ("num_slots", ctypes.c_uint32),
        ("capacity_bytes", ctypes.c_uint64),
        ("num_used_slots", ctypes.c_uint64),
        ("uuid", ctypes.c_char * 64),
        ("name", ctypes.c_char * 64),
        ("reserved", ctypes.c_char * 96),
        ("slots", _Slot * NUM_SLOTS),
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """What a ledger says at one moment."""

    capacity_bytes: int
    used_bytes: int
    """Bytes that living processes hold; more than the capacity only if one of them is unenforced."""
    holders: tuple[Holder, ...]
    num_unenforced: int
    """Living processes that charge by hand because they have no native allocator."""


def devices_folder() -> Path:
    """The folder of this user's ledgers, created on first use.

    Raises DeviceError where it belongs to somebody else.
    """
    if configured := os.environ.get("REVDIST_DEVICES_DIR"):
        folder = Path(configured)
    else:
        shared = Path("/dev/shm")  # noqa: S108  a folder of our own in it, mode 0700
        parent = shared if shared.is_dir() else Path(tempfile.gettempdir())
        folder = parent / f"revdist-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise DeviceError(f"{folder} belongs to another user: set REVDIST_DEVICES_DIR to a folder of yours")
    return folder.resolve()


def ledger_path(name: str, directory: str | Path | None = None) -> Path:
    """Where the ledger of the device `name` lies, whether it exists or not."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a device: use up to 60 letters, digits, '.', '_' and '-'")
    return (Path(directory).resolve() if directory else devices_folder()) / f"{name}.ledger"


def ledger_paths(directory: str | Path | None = None) -> list[Path]:
    """Every ledger there is, `cpu-2` before `cpu-10`."""
    folder = Path(directory).resolve() if directory else devices_folder()
    return sorted(folder.glob("*.ledger"), key=lambda path: (device_number(path.stem), path.stem))


def device_number(name: str) -> int:
    """The number that ends a device's name, 0 if none does."""
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else 0


def ledger_uuid(path: Path) -> str:
    """The UUID of the CPU device with that ledger: the same whenever the device is created again."""
    return f"CPU-{host.machine_uuid(str(os.getuid()), str(path))}"


class Ledger:
    """One ledger file, mapped. Reading it is cheap and changes nothing."""

    def __init__(self, path: Path) -> None:
        """Maps an existing ledger.

        Raises DeviceNotFound if there is none, DeviceError if the file is no ledger of this version.
        """
        self.path = path
        try:
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), ctypes.sizeof(_File))
        except FileNotFoundError:
            known = ", ".join(p.stem for p in ledger_paths(path.parent)) or "none"
            raise DeviceNotFound(
                f"no CPU device {path.stem!r} in {path.parent} (there: {known}): give it a capacity to create it"
            ) from None
        except (OSError, ValueError) as error:
            raise DeviceError(f"cannot map the ledger {path}: {error}; remove the file if nothing uses it") from None
        self._file = _File.from_buffer(self._memory)
        if (self._file.magic, self._file.version, self._file.num_slots) != (MAGIC, VERSION, NUM_SLOTS):
            raise DeviceError(f"{path} is no ledger of version {VERSION}: remove the file if nothing uses it")

    @classmethod
    def create(cls, path: Path, capacity_bytes: int) -> Ledger:
        """Opens the ledger with that capacity, creating it if need be.

        Raises UsageError if other processes use it with another capacity.
        """
        _check_capacity(path, capacity_bytes)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            if not path.exists():
                _write_new(path, capacity_bytes)
            ledger = cls(path)
            ledger._resize(capacity_bytes)
        return ledger

    @property
    def name(self) -> str:
        return str(self._file.name.decode())

    @property
    def uuid(self) -> str:
        return str(self._file.uuid.decode())

    @property
    def capacity_bytes(self) -> int:
        return int(self._file.capacity_bytes)

    def balance(self) -> Balance:
        """What living processes hold. Slots of dead ones count as free; the allocator frees them when it must."""
        alive = [slot for slot in self._owned_slots() if self._is_alive(slot)]
        held = [(slot, int(slot.current_bytes)) for slot in alive]
        holders = [
            Holder(pid=host.identity_pid(slot.owner), name=slot.name.decode(errors="replace"), used_bytes=num_bytes)
            for slot, num_bytes in sorted(held, key=lambda item: -item[1])
            if num_bytes
        ]
        return Balance(
            capacity_bytes=self.capacity_bytes,
            used_bytes=sum(num_bytes for _, num_bytes in held),
            holders=tuple(holders),
            num_unenforced=sum(1 for slot in alive if slot.unenforced),
        )

    def claim_slot(self, process_name: str) -> int:
        """This process's slot, a free one on the first call.

        Raises DeviceError if every slot is taken.
        """
        identity = host.process_identity(os.getpid())
        with _locked(self.path.parent):
            slots = list(enumerate(self._file.slots))
            for index, slot in slots:
                if slot.owner == identity:
                    slot.name = process_name.encode()[:87]
                    return index
            if not any(self._is_alive(slot) for slot in self._owned_slots()):
                self._forget_everybody()
            # A free one first: one of a dead process may be being freed at this very moment.
            for available in (lambda slot: slot.owner == 0, lambda slot: not self._is_alive(slot)):
                for index, slot in slots:
                    if available(slot):
                        self._fill(index, identity, process_name)
                        return index
        raise DeviceError(
            f"all {NUM_SLOTS} slots of device {self.name} are taken: end some of its processes, or remove {self.path}"
        )

    def charge_by_hand(self, slot_index: int, num_bytes: int) -> None:
        """Sets what this process holds, for a process without the native allocator."""
        slot = self._file.slots[slot_index]
        slot.unenforced = 1
        slot.current_bytes = num_bytes

    def resize(self, capacity_bytes: int) -> None:
        """Gives the device another capacity. Raises UsageError if other processes use it."""
        _check_capacity(self.path, capacity_bytes)
        with _locked(self.path.parent):
            self._resize(capacity_bytes)

    def remove(self) -> None:
        """Deletes the file.

        Raises DeviceError while other processes use the device. What this one holds of it stays valid.
        """
        with _locked(self.path.parent):
            if users := self._users():
                raise DeviceError(f"device {self.name} is in use by {users}: end them first")
            self.path.unlink(missing_ok=True)

    def _owned_slots(self) -> list[_Slot]:
        return [slot for slot in self._file.slots[: self._file.num_used_slots] if slot.owner]

    def _users(self) -> str:
        """Other living processes that use the device."""
        own = host.process_identity(os.getpid())
        return ", ".join(
            f"process {host.identity_pid(slot.owner)} ({slot.name.decode(errors='replace')})"
            for slot in self._owned_slots()
            if slot.owner != own and self._is_alive(slot)
        )

    @staticmethod
    def _is_alive(slot: _Slot) -> bool:
        if slot.pid_namespace != host.pid_namespace():
            return True  # its pid says nothing here
        return bool(host.process_identity(host.identity_pid(slot.owner)) == slot.owner)

    def _fill(self, index: int, identity: int, process_name: str) -> None:
        slot = self._file.slots[index]
        slot.pid_namespace = host.pid_namespace()
        slot.current_bytes = slot.peak_bytes = slot.unenforced = 0
        slot.name = process_name.encode()[:87]
        self._file.num_used_slots = max(self._file.num_used_slots, index + 1)
        slot.owner = identity

    def _forget_everybody(self) -> None:
        for slot in self._owned_slots():
            ctypes.memset(ctypes.addressof(slot), 0, ctypes.sizeof(slot))
        self._file.num_used_slots = 0

    def _resize(self, capacity_bytes: int) -> None:
        if capacity_bytes == self.capacity_bytes:
            return
        if users := self._users():
            raise UsageError(
                f"device {self.name} has {format_bytes(self.capacity_bytes)}, not {format_bytes(capacity_bytes)}, "
                f"and is in use by {users}: end them, or choose another device name"
            )
        self._file.capacity_bytes = capacity_bytes


def _check_capacity(path: Path, capacity_bytes: int) -> None:
    if capacity_bytes <= 0:
        raise UsageError(f"capacity {capacity_bytes} of device {path.stem!r} must be positive")


def _write_new(path: Path, capacity_bytes: int) -> None:
    content = _File(magic=MAGIC, version=VERSION, num_slots=NUM_SLOTS, capacity_bytes=capacity_bytes)
    content.name, content.uuid = path.stem.encode(), ledger_uuid(path).encode()
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.touch(mode=0o600)
    draft.write_bytes(bytes(content))
    draft.replace(path)  # readers see a whole ledger or none


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Creating, resizing, claiming and removing exclude each other; charging and reading need no lock."""
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

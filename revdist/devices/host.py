"""The machine below the devices: its name, its memory and the identity of its processes."""

from __future__ import annotations

import functools
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

PID_BITS = 22
"""Linux never hands out a pid of 2**22 or more."""
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def host_name() -> str:
    return socket.gethostname()


def machine_uuid(*parts: str) -> str:
    """A UUID that is the same on every call on this host for the same parts, and differs between hosts."""
    try:
        machine = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine = f"{uuid.getnode():x}"
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join((machine, host_name(), *parts))))


def host_memory() -> tuple[int, int]:
    """`(total_bytes, free_bytes)` for processes here: the machine's, or their control group's if that is less.

    Files that the kernel caches count as free.
    """
    fields = {}
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024
    total, free = fields["MemTotal"], fields["MemAvailable"]
    for limit_bytes, used_file, prefix in _memory_limits(total):
        used_bytes = max(0, (_read_number(used_file) or 0) - _cached_bytes(used_file.with_name("memory.stat"), prefix))
        total, free = min(total, limit_bytes), min(free, max(0, limit_bytes - used_bytes))
    return total, free


@functools.lru_cache(maxsize=1)
def _memory_limits(total_bytes: int) -> tuple[tuple[int, Path, str], ...]:
    """Of every control group above this process that limits memory: the limit, the file of what is used, the prefix."""
    limits = []
    for folder, limit_name, used_name, prefix in _control_groups():
        limit_bytes = _read_number(folder / limit_name)
        if limit_bytes is not None and limit_bytes < total_bytes:
            limits.append((limit_bytes, folder / used_name, prefix))
    return tuple(limits)


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Every control group above this process that counts memory.

    Its folder, the names of two files in it, and the prefix in memory.stat of what counts its children too.
    """
    try:
        groups = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            root, names = _GROUPS, ("memory.max", "memory.current", "")
        elif controllers == "memory":
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inside = (root / path.lstrip("/")).resolve()
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(root):
                # In a container the path is the host's, and only the root is there to see.
                yield folder, *names


def _cached_bytes(statistics: Path, prefix: str) -> int:
    """Bytes of cached files, which a group gives up before it runs short; 0 where it does not tell."""
    keys = (f"{prefix}inactive_file", f"{prefix}active_file")
    try:
        counts = [line.split() for line in statistics.read_text(encoding="ascii").splitlines()]
    except OSError:
        return 0
    return sum(int(number) for key, number in counts if key in keys)


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def process_identity(pid: int) -> int:
    """Start time and pid of a living process as one number, 0 if there is none.

    A pid alone may have been handed out again. A zombie counts as dead: its memory is free.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X", b"x"):
        return 0
    return int(fields[19]) << PID_BITS | pid


def identity_pid(identity: int) -> int:
    return identity & ((1 << PID_BITS) - 1)


def pid_namespace() -> int:
    """Inode of this process's pid namespace: elsewhere our pids mean nothing."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def process_name(pid: int) -> str:
    """What runs there, short: a Python process by its module or script. Empty if it is gone or not ours to see."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return ""
    program = Path(words[0]).name
    if program.startswith("python") and len(words) > 1:
        if "-m" in words[:-1]:
            return words[words.index("-m") + 1]
        script = next((word for word in words[1:] if not word.startswith("-")), "")
        return f"{program} -c" if "-c" in words else Path(script).name or program
    return program

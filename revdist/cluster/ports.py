"""Ports for what will listen on loopback later, in another process."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_LOWEST = 20_000
"""Ray's workers and services take what they are not told below this."""
_GIVEN_BY_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 200


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now, below those that the kernel gives to connections; empty if too few.

    A port that the kernel gives away may be gone before its listener is there.
    """
    if not _GIVEN_BY_KERNEL.exists():
        return []
    first_given = int(_GIVEN_BY_KERNEL.read_text(encoding="ascii").split()[0])
    if first_given - _LOWEST < _TRIES:
        return []
    found: list[int] = []
    for port in random.SystemRandom().sample(range(_LOWEST, first_given), _TRIES):
        if len(found) < count and _is_free(port):
            found.append(port)
    return found if len(found) == count else []


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        return True
    return False

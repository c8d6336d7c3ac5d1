"""The TCP sockets of this process, by their two ends.

A collective that waits for a rank which froze, or whose host is gone, waits until its timeout, and gloo
offers no way to end it. Shutting down the sockets it waits on does, within a millisecond, on this rank and
on every peer that they lead to. Finding them needs Linux's /proc; elsewhere none are found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

_LISTENING = "0A"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TcpSocket:
    """One open socket."""

    descriptor: int
    inode: int
    local_port: int
    remote_address: str
    remote_port: int
    listening: bool


def tcp_sockets() -> list[TcpSocket]:
    """All TCP sockets that this process has open now."""
    own = dict(_own_sockets())
    return [found for name in ("tcp", "tcp6") for found in _read_table(name, own)]


def shut_down(sockets: Iterable[TcpSocket]) -> None:
    """End both directions of each connection. Whoever waits on one gets an error; the descriptors stay open."""
    for found in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.descriptor)) as duplicate:
            # The number may have been closed and given to another socket since it was looked up.
            if os.fstat(duplicate.fileno()).st_ino == found.inode:
                duplicate.shutdown(socket.SHUT_RDWR)


def _own_sockets() -> Iterator[tuple[int, int]]:
    """Inode and descriptor of every socket of this process."""
    folder = Path("/proc/self/fd")
    for entry in os.listdir(folder) if folder.exists() else []:
        with contextlib.suppress(OSError):
            target = os.readlink(folder / entry)
            if target.startswith("socket:["):
                yield int(target[8:-1]), int(entry)


def _read_table(name: str, own: dict[int, int]) -> Iterator[TcpSocket]:
    table = Path("/proc/self/net") / name
    if not table.exists():
        return
    for line in table.read_text().splitlines()[1:]:
        columns = line.split()
        descriptor = own.get(int(columns[9]))
        if descriptor is None:
            continue
        address, port = _end(columns[2])
        yield TcpSocket(
            descriptor=descriptor,
            inode=int(columns[9]),
            local_port=_end(columns[1])[1],
            remote_address=address,
            remote_port=port,
            listening=columns[3] == _LISTENING,
        )


def _end(text: str) -> tuple[str, int]:
    """Address and port of `0100007F:1F90`: the kernel writes each 32-bit word of an address in host order."""
    words, _, port = text.partition(":")
    raw = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int(port, 16)

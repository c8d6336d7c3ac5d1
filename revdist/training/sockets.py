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
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

_SYN_SENT = bytes([2])
"""State of a connection that is not answered yet, as TCP_INFO begins."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TcpSocket:
    """One open socket."""

    descriptor: int
    inode: int
    local_port: int
    remote_address: str
    remote_port: int
    listening: bool
    connecting: bool
    """Not answered by the other end yet."""


def tcp_sockets() -> list[TcpSocket]:
    """All TCP sockets that this process has open now."""
    found = [one for descriptor in _descriptors() if (one := _look_at(descriptor)) is not None]
    if not any(one.connecting for one in found):
        return found
    remotes = dict(_remote_ends())
    return [_with_remote(one, remotes.get(one.inode)) if one.connecting else one for one in found]


def shut_down(sockets: Iterable[TcpSocket]) -> None:
    """End both directions of each connection. Whoever waits on one gets an error; the descriptors stay open."""
    for found in sockets:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.descriptor)) as duplicate:
            # The number may have been closed and given to another socket since it was looked up.
            if os.fstat(duplicate.fileno()).st_ino == found.inode:
                duplicate.shutdown(socket.SHUT_RDWR)


def _descriptors() -> list[int]:
    folder = Path("/proc/self/fd")
    return [int(entry) for entry in os.listdir(folder)] if folder.exists() else []


def _look_at(descriptor: int) -> TcpSocket | None:
    """The TCP socket behind a descriptor; None where there is something else, or nothing any more.

    Asking each socket takes a hundredth of the time that the kernel takes to list those of all processes.
    """
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISSOCK(status.st_mode):
            return None
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            if duplicate.family not in (socket.AF_INET, socket.AF_INET6) or duplicate.type != socket.SOCK_STREAM:
                return None
            try:
                remote = duplicate.getpeername()
            except OSError:
                remote = ("", 0)
            return TcpSocket(
                descriptor=descriptor,
                inode=status.st_ino,
                local_port=duplicate.getsockname()[1],
                remote_address=_plain(remote[0]),
                remote_port=remote[1],
                listening=bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)),
                connecting=duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _SYN_SENT,
            )
    except OSError:
        return None


def _remote_ends() -> Iterator[tuple[int, tuple[str, int]]]:
    """Per inode: where a socket leads to. The kernel's table knows it before there is an answer from there."""
    for name in ("tcp", "tcp6"):
        table = Path("/proc/self/net") / name
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            columns = line.split()
            yield int(columns[9]), _end(columns[2])


def _with_remote(found: TcpSocket, remote: tuple[str, int] | None) -> TcpSocket:
    address, port = remote or ("", 0)
    return dataclasses.replace(found, remote_address=address, remote_port=port)


def _end(text: str) -> tuple[str, int]:
    """Address and port of `0100007F:1F90`: the kernel writes each 32-bit word of an address in host order."""
    words, _, port = text.partition(":")
    raw = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    return _plain(str(ipaddress.ip_address(raw))), int(port, 16)


def _plain(text: str) -> str:
    """An address as the store's and gloo's are written, which IPv6 sockets tell as `::ffff:10.0.0.1`."""
    if not text:
        return text
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)

"""Forming and leaving the process group of a run's replicas.

The store listens on a socket that the storing rank bound itself, to one address and a port that the
kernel chose: no race for a port, and nothing listens on other networks. A prefix names each forming
of the group, so that a later one never reads keys of an earlier one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import struct
from datetime import timedelta

import torch.distributed as dist

_SIOCGIFADDR = 0x8915


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of a group meet, and who this one is among them."""

    host: str
    """Address of the store."""
    port: int
    prefix: str
    """Name of this forming of the group."""
    rank: int
    world_size: int
    local_rank: int = 0
    """Number of this rank among those on its host."""
    address: str = "127.0.0.1"
    """This rank's own address, on the network that the ranks share."""
    timeout_s: float = 300.0
    """Longest wait for peers, in forming the group and in any collective."""


def listen(address: str) -> socket.socket:
    """A socket that the store will listen on, bound to one address and a port of the kernel's choice."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    listener.listen(128)
    return listener


def join(rendezvous: Rendezvous, *, kind: str, listener: socket.socket | None = None) -> None:
    """Form the default process group: gloo for CPU tensors, and NCCL for CUDA tensors on a `cuda` device.

    The rank that passes its `listener` hosts the store. Sets RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT for user code.
    """
    _announce(rendezvous)
    timeout = timedelta(seconds=rendezvous.timeout_s)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else os.dup(listener.fileno()),
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=dist.PrefixStore(rendezvous.prefix, store),  # type: ignore[attr-defined]
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timeout,
    )


def leave() -> None:
    """Leave the group, once no DistributedDataParallel of this process uses it any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an IPv4 address; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _announce(rendezvous: Rendezvous) -> None:
    os.environ.update(
        RANK=str(rendezvous.rank),
        LOCAL_RANK=str(rendezvous.local_rank),
        WORLD_SIZE=str(rendezvous.world_size),
        MASTER_ADDR=rendezvous.host,
        MASTER_PORT=str(rendezvous.port),
    )
    interface = interface_of(rendezvous.address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)

"""Forming and leaving the process group of a run's replicas.

The store listens on a socket that the storing rank bound itself, to one address and a port that the
kernel chose: no race for a port, and nothing listens on other networks. A prefix names each forming
of the group, so that a later one never reads keys of an earlier one.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from revdist.training.network import interface_of
from revdist.training.orders import Rendezvous


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

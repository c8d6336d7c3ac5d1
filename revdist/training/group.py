"""The process group of a run's replicas: formed, left, and formed anew as ranks go and come.

The store listens on a socket that its host bound itself, to one address and a port that the kernel
chose: no race for a port, and nothing listens on other networks. It serves every group that this rank
is the first of; a prefix names each forming, so that a later one never reads keys of an earlier one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from revdist.training.connections import Connections, PeersLost
from revdist.training.network import interface_of
from revdist.training.orders import Rendezvous

_BACKEND = "connected_gloo"
"""Name under which torch takes gloo's connections that are there already."""


def is_broken(error: BaseException) -> bool:
    """Whether an error says that a peer, or the way to it, is gone, rather than what this rank did wrong."""
    if isinstance(error, PeersLost | dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "Connection closed by peer" in text)


@final
class Group:
    """The group that this rank is in. One thread joins and leaves; any thread may prepare the next or interrupt."""

    def __init__(self, kind: str, listener: socket.socket | None) -> None:
        """kind: of the device, `cpu` or `cuda`. listener: where this rank's store listens, were it the first."""
        self._has_nccl = kind == "cuda"
        self._listener = listener
        self._served: Any = None
        self._lock = threading.Lock()
        self._current: Connections | None = None
        self._coming: Connections | None = None
        self._wanted = -1
        self._begun = -1

    def prepare(self, rendezvous: Rendezvous, *, number: int) -> None:
        """Connect to the ranks of the next group while this one works on: `join` finds that done.

        Raises as `join` does.
        """
        with self._lock:
            if number <= self._begun:  # the group at work broke, and `join` needed the next one at once
                return
            self._coming = connections = self._expect(rendezvous, number)
        connections.make(functools.partial(self._store, rendezvous))

    def join(self, rendezvous: Rendezvous, *, number: int = 0) -> None:
        """Form the default process group: gloo for CPU tensors, and NCCL for CUDA tensors on a `cuda` device.

        Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for user code.

        Raises PeersLost where `interrupt` ended it or the connection broke, RunFailed where ranks did not
        come in time.
        """
        announce(rendezvous)
        with self._lock:
            coming, self._coming = self._coming, None
            prepared = coming is not None and coming.number == number
            self._current = current = coming if prepared and coming else self._expect(rendezvous, number)
        if not prepared:
            if coming is not None:
                coming.interrupt()
            current.make(functools.partial(self._store, rendezvous))
        self._adopt(current)

    def join_alone(self) -> None:
        """Form a group of this rank only, until it is told which one to join."""
        backend = "cpu:gloo,cuda:nccl" if self._has_nccl else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    def interrupt(self, before: int) -> None:
        """End whatever waits for a peer in a group, or in the forming of one, whose number is below `before`.

        Collectives under way, here and on the peers, raise an error that `is_broken` recognises.
        """
        with self._lock:
            self._wanted = max(self._wanted, before)
            early = [one for one in (self._current, self._coming) if one is not None and one.number < before]
            in_current = self._current in early
        for connections in early:
            connections.interrupt()
        if in_current:
            self._abort_nccl()

    def leave(self) -> None:
        """Leave the group, once no DistributedDataParallel of this process uses it any more.

        Peers that wait for this rank stop waiting.
        """
        if not dist.is_initialized():
            return
        with self._lock:
            current, self._current = self._current, None
        if current is not None:
            current.shut_down()
            self._abort_nccl()
        dist.destroy_process_group()

    def _expect(self, rendezvous: Rendezvous, number: int) -> Connections:
        self._begun = number
        connections = Connections(rendezvous, number=number)
        if number < self._wanted:  # the order for a later group may have come before this one was begun
            connections.interrupt()
        return connections

    def _adopt(self, connections: Connections) -> None:
        """Make connections that are there the default process group."""
        store, gloo = connections.wait()
        rendezvous = connections.rendezvous
        dist.Backend.register_backend(_BACKEND, _once(gloo), devices=["cpu"])
        dist.init_process_group(
            f"cpu:{_BACKEND},cuda:nccl" if self._has_nccl else _BACKEND,
            store=store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=timedelta(seconds=rendezvous.timeout_s),
        )

    def _store(self, rendezvous: Rendezvous, timeout: timedelta) -> Any:
        """A way of its own to the store, which the first rank serves."""
        if rendezvous.rank == 0 and self._listener is not None and self._served is None:
            self._served = _store(rendezvous, timeout, self._listener)
        return _store(rendezvous, timeout, None)

    def _abort_nccl(self) -> None:
        """End NCCL's collectives, which have no sockets of their own that could be shut down."""
        group = dist.group.WORLD
        if self._has_nccl and group is not None and dist.get_world_size() > 1:
            with contextlib.suppress(RuntimeError, AttributeError):
                group._get_backend(torch.device("cuda")).abort()  # type: ignore[attr-defined,unused-ignore]


def _once(connected: Any) -> Callable[..., Any]:
    """Gives torch the connected backend where it asks first; groups that user code forms within get their own."""
    ready = [connected]

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        if ready:
            return ready.pop()
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    return create


def _store(rendezvous: Rendezvous, timeout: timedelta, listener: socket.socket | None) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else os.dup(listener.fileno()),
    )


def announce(rendezvous: Rendezvous) -> None:
    """Set what torchrun sets for user code: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
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

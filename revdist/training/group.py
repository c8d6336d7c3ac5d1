"""The process group of a run's replicas: formed, left, and formed anew as ranks go and come.

The store listens on a socket that its host bound itself, to one address and a port that the kernel
chose: no race for a port, and nothing listens on other networks. It serves every group that this rank
is the first of; a prefix names each forming, so that a later one never reads keys of an earlier one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist

from revdist.errors import RunFailed
from revdist.training.network import interface_of
from revdist.training.orders import Rendezvous
from revdist.training.sockets import TcpSocket, shut_down, tcp_sockets

_LOOK_S = 0.005
"""Pause between looks for ranks that have not come yet."""
_CONNECT_S = 20.0
"""Longest time that ranks which are all there need to connect to each other."""


class PeersLost(Exception):
    """The group is broken: a rank, or the way to it, is gone, or another group has been ordered."""


def is_broken(error: BaseException) -> bool:
    """Whether an error says that a peer, or the way to it, is gone, rather than what this rank did wrong."""
    if isinstance(error, PeersLost | dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "Connection closed by peer" in text)


@final
class Group:
    """The group that this rank is in. One thread joins and leaves; any thread may interrupt it."""

    def __init__(self, kind: str, listener: socket.socket | None) -> None:
        """kind: of the device, `cpu` or `cuda`. listener: where this rank's store listens, were it the first."""
        self._backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        self._listener = listener
        self._served: Any = None
        self._lock = threading.Lock()
        self._number = -1
        self._wanted = -1
        self._interrupted = False
        self._ends: frozenset[tuple[str, int]] = frozenset()
        self._own_ports: frozenset[int] = frozenset()

    def join(self, rendezvous: Rendezvous, *, number: int = 0) -> None:
        """Form the default process group: gloo for CPU tensors, and NCCL for CUDA tensors on a `cuda` device.

        Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for user code.

        Raises PeersLost where `interrupt` ended it or the connection broke, RunFailed where ranks did not
        come in time.
        """
        with self._lock:
            self._number = number
            # The order for a later group may have come before this one was begun.
            self._interrupted = number < self._wanted
            # The first rank keeps its way to its own store, which serves later groups too.
            self._ends = frozenset({(rendezvous.host, rendezvous.port)} if rendezvous.rank else ())
            self._own_ports = frozenset()
        announce(rendezvous)
        try:
            store = dist.PrefixStore(rendezvous.prefix, self._store(rendezvous))  # type: ignore[attr-defined]
            self._meet(store, "here", rendezvous, str(rendezvous.rank))
            own_ports = self._connect(store, rendezvous)
            ends = self._meet(store, "ends", rendezvous, " ".join([rendezvous.address, *map(str, own_ports)]))
        except (dist.DistError, RuntimeError) as error:
            raise PeersLost(f"ranks could not connect: {error}") from error
        with self._lock:
            self._own_ports = own_ports
            self._ends = frozenset((text.split()[0], int(port)) for text in ends for port in text.split()[1:])
        self._check()

    def join_alone(self) -> None:
        """Form a group of this rank only, until it is told which one to join."""
        dist.init_process_group(self._backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]

    def interrupt(self, before: int) -> None:
        """End whatever waits for a peer in a group, or the forming of one, whose number is below `before`.

        Collectives under way, here and on the peers, raise an error that `is_broken` recognises.
        """
        with self._lock:
            self._wanted = max(self._wanted, before)
            if self._number >= before:
                return
            self._interrupted = True
        self._shut_down()

    def leave(self) -> None:
        """Leave the group, once no DistributedDataParallel of this process uses it any more.

        Peers that wait for this rank stop waiting.
        """
        if dist.is_initialized():
            self._shut_down()
            dist.destroy_process_group()

    def _store(self, rendezvous: Rendezvous) -> Any:
        if rendezvous.rank == 0 and self._listener is not None:
            if self._served is None:
                self._served = _store(rendezvous, self._listener)
            return self._served
        return _store(rendezvous, None)

    def _meet(self, store: Any, what: str, rendezvous: Rendezvous, word: str) -> list[str]:
        """Leave a word for the others and collect theirs, in rank order."""
        store.set(f"{what}/{rendezvous.rank}", word)
        missing = [f"{what}/{rank}" for rank in range(rendezvous.world_size)]
        until_s = time.monotonic() + rendezvous.timeout_s
        while missing := [key for key in missing if not store.check([key])]:
            self._check()
            if time.monotonic() > until_s:
                late = ", ".join(key.rpartition("/")[2] for key in missing)
                raise RunFailed(f"rank {late} did not come to the others within {rendezvous.timeout_s:.0f} s")
            time.sleep(_LOOK_S)
        return [store.get(f"{what}/{rank}").decode() for rank in range(rendezvous.world_size)]

    def _connect(self, store: Any, rendezvous: Rendezvous) -> frozenset[int]:
        """Connect to all ranks, which are there; returns the ports that they connect to."""
        before = {found.inode for found in tcp_sockets()}
        dist.init_process_group(
            self._backend,
            store=store,
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=timedelta(seconds=min(rendezvous.timeout_s, _CONNECT_S)),
        )
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=rendezvous.timeout_s))
        return frozenset(found.local_port for found in tcp_sockets() if found.listening and found.inode not in before)

    def _check(self) -> None:
        if self._interrupted:
            raise PeersLost("another group has been ordered")

    def _shut_down(self) -> None:
        with self._lock:
            own_ports, ends = self._own_ports, self._ends
        shut_down(found for found in tcp_sockets() if _belongs(found, own_ports, ends))
        if "nccl" in self._backend and dist.is_initialized() and dist.get_world_size() > 1:
            _abort_nccl()


def _belongs(found: TcpSocket, own_ports: frozenset[int], ends: frozenset[tuple[str, int]]) -> bool:
    """Whether a connection was made to this rank's part of the group, or by it to a peer's."""
    return not found.listening and (found.local_port in own_ports or (found.remote_address, found.remote_port) in ends)


def _abort_nccl() -> None:
    """End NCCL's collectives, which have no sockets of their own that could be shut down."""
    group = dist.group.WORLD
    with contextlib.suppress(RuntimeError, AttributeError):
        group._get_backend(torch.device("cuda")).abort()  # type: ignore[union-attr,unused-ignore]


def _store(rendezvous: Rendezvous, listener: socket.socket | None) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        is_master=listener is not None,
        timeout=timedelta(seconds=rendezvous.timeout_s),
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

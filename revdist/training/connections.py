"""One rank's connections to the others of a group: made in one thread, ended from any other.

They are made without anything that a group at work uses, so that those of the next group can be made
beside it. Each set knows its own sockets by their ends: ending one leaves the other's alone, and Ray's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, final

import torch.distributed as dist

from revdist.errors import RunFailed
from revdist.training.gloo_threads import let_others_finish
from revdist.training.orders import Rendezvous
from revdist.training.sockets import TcpSocket, shut_down, tcp_sockets

_LOOK_S = 0.005
"""Pause between looks for ranks that have not come yet."""
_REACH_S = 2.0
"""Longest wait for the store's host to answer at all."""
_STORE_S = 0.5
"""How long torch's client tries anew where it is refused; an answer it awaits without end."""
_CONNECT_S = 20.0
"""Longest time that ranks which are all there need to connect to each other."""
_ORDERED = "another group has been ordered"


class PeersLost(Exception):
    """The group is broken: a rank, or the way to it, is gone, or another group has been ordered."""


@final
class Connections:
    """What this rank has open to the others of one group."""

    def __init__(self, rendezvous: Rendezvous, *, number: int) -> None:
        """number: of the group."""
        self.rendezvous = rendezvous
        self.number = number
        self._lock = threading.Lock()
        self._interrupted = False
        self._is_making = False
        self._store_inodes: frozenset[int] = frozenset()
        self._others_inodes: frozenset[int] | None = None
        """Of sockets that were there before, while the way to the store is being opened."""
        self._own_ports: frozenset[int] = frozenset()
        self._ends: frozenset[tuple[str, int]] = frozenset()
        self._made: Future[tuple[Any, Any]] = Future()

    def make(self, open_store: Callable[[timedelta], Any]) -> None:
        """Wait for the others and connect to each of them. Whoever waits in `wait` gets what comes of it.

        open_store: returns the store, or raises a DistError where it cannot within the time given.

        Raises PeersLost where `interrupt` ended it or a connection broke, RunFailed where ranks did not
        come in time.
        """
        with self._lock:
            self._is_making = True
        try:
            made = self._make(open_store)
        except (dist.DistError, RuntimeError) as error:
            why = _ORDERED if self._interrupted else f"ranks could not connect: {error}"
            self._made.set_exception(PeersLost(why))
        except Exception as error:
            self._made.set_exception(error)
        else:
            self._made.set_result(made)
        self.wait()

    def wait(self) -> tuple[Any, Any]:
        """The store and the gloo backend, once they are made. Raises what `make` raised."""
        made = self._made.result()
        self._check()
        return made

    def interrupt(self) -> None:
        """End whatever waits for a peer here: making the connections, or a collective over them."""
        with self._lock:
            self._interrupted = True
        self.shut_down()
        if self._is_making and not self._made.done():
            threading.Thread(target=self._end_tries, name="revdist-interrupt", daemon=True).start()

    def _end_tries(self) -> None:
        """End every try to reach a peer or the store, until the thread that makes them has given up."""
        while not self._made.done():
            time.sleep(_LOOK_S)
            self.shut_down()

    def shut_down(self) -> None:
        """End the connections. Collectives over them, here and on the peers, raise an error."""
        shut_down(found for found in tcp_sockets() if self._has(found))

    def _make(self, open_store: Callable[[timedelta], Any]) -> tuple[Any, Any]:
        rendezvous = self.rendezvous
        store = dist.PrefixStore(rendezvous.prefix, self._open(open_store))  # type: ignore[attr-defined]
        devices, own_ports = _open_devices(rendezvous.address)
        with self._lock:
            self._own_ports = own_ports
        words = self._meet(store, " ".join([rendezvous.address, *map(str, sorted(own_ports))]))
        with self._lock:
            self._ends = frozenset((text.split()[0], int(port)) for text in words for port in text.split()[1:])
        self._check()
        backend = _connect(dist.PrefixStore("gloo", store), rendezvous, devices)  # type: ignore[attr-defined]
        return store, backend

    def _open(self, open_store: Callable[[timedelta], Any]) -> Any:
        """The way to the store, which `interrupt` can end: other groups have their own ways to it.

        Its host may be gone, which the supervisor finds out in its own time: torch's client would go on trying, so
        it gets little time for each of several attempts.
        """
        others = frozenset(found.inode for found in tcp_sockets())
        with self._lock:
            self._others_inodes = others
        try:
            store = self._try_to_open(open_store)
            store.set_timeout(timedelta(seconds=self.rendezvous.timeout_s))
            own = [one for one in tcp_sockets() if self._leads_to_store(one)]
            with self._lock:
                self._store_inodes = frozenset(found.inode for found in own if found.inode not in others)
        finally:
            self._others_inodes = None
        return store

    def _try_to_open(self, open_store: Callable[[timedelta], Any]) -> Any:
        until_s = time.monotonic() + self.rendezvous.timeout_s
        while True:
            self._reach(until_s)
            try:
                return open_store(timedelta(seconds=_STORE_S))
            except dist.DistError:
                self._check()
                if time.monotonic() > until_s:
                    raise

    def _reach(self, until_s: float) -> None:
        """Wait until the store's host answers. Raises PeersLost or RunFailed as `make` does."""
        end = (self.rendezvous.host, self.rendezvous.port)
        while True:
            self._check()
            try:
                socket.create_connection(end, timeout=_REACH_S).close()
                return
            except OSError as error:
                if time.monotonic() > until_s:
                    raise RunFailed(f"rank 0 on {end[0]} does not answer at port {end[1]}: {error}") from None
            time.sleep(_LOOK_S)

    def _meet(self, store: Any, word: str) -> list[str]:
        """Leave a word for the others and collect theirs, in rank order."""
        rendezvous = self.rendezvous
        keys = [f"here/{rank}" for rank in range(rendezvous.world_size)]
        store.set(keys[rendezvous.rank], word)
        until_s = time.monotonic() + rendezvous.timeout_s
        while not store.check(keys):
            self._check()
            if time.monotonic() > until_s:
                late = ", ".join(key.rpartition("/")[2] for key in keys if not store.check([key]))
                raise RunFailed(f"rank {late} did not come to the others within {rendezvous.timeout_s:.0f} s")
            time.sleep(_LOOK_S)
        return [text.decode() for text in store.multi_get(keys)]

    def _check(self) -> None:
        if self._interrupted:
            raise PeersLost(_ORDERED)

    def _leads_to_store(self, found: TcpSocket) -> bool:
        return (found.remote_address, found.remote_port) == (self.rendezvous.host, self.rendezvous.port)

    def _has(self, found: TcpSocket) -> bool:
        """Whether a socket was connected to this rank's part of the group, or by it to a peer's or to the store."""
        with self._lock:
            if found.inode in self._store_inodes:
                return True
            if (
                self._others_inodes is not None
                and found.inode not in self._others_inodes
                and self._leads_to_store(found)
            ):
                return True
            to_peer = (found.remote_address, found.remote_port) in self._ends
            return not found.listening and (found.local_port in self._own_ports or to_peer)


def _open_devices(address: str) -> tuple[list[Any], frozenset[int]]:
    """What gloo listens on for peers, on the interfaces that the user named or else the address; and the ports."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    gloo: Any = dist.ProcessGroupGloo
    before = {found.inode for found in tcp_sockets()}
    if interfaces:
        devices = [gloo.create_device(interface=name) for name in interfaces.split(",")]
    else:
        devices = [gloo.create_device(hostname=address)]
    ports = (found.local_port for found in tcp_sockets() if found.listening and found.inode not in before)
    return devices, frozenset(ports)


def _connect(store: Any, rendezvous: Rendezvous, devices: list[Any]) -> Any:
    """Connect to all ranks, which are there."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = devices
    options._threads = 2 * len(devices)
    options._timeout = timedelta(seconds=min(rendezvous.timeout_s, _CONNECT_S))
    backend = gloo(store, rendezvous.rank, rendezvous.world_size, options)
    backend._set_default_timeout(timedelta(seconds=rendezvous.timeout_s))
    backend._set_sequence_number_for_group()
    let_others_finish()
    return backend

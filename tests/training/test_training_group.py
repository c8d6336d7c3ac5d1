"""Groups form, break and form anew; what waits for a peer that does not answer can be interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_ranks import PATIENCE_S, on_ranks, rendezvous

from revdist.training.connections import PeersLost
from revdist.training.group import Group, is_broken
from revdist.training.network import listen
from revdist.training.orders import Rendezvous
from revdist.training.sockets import shut_down, tcp_sockets


def total(rank: int) -> float:
    value = torch.tensor([float(rank + 1)])
    dist.all_reduce(value)
    return float(value)


def test_survivors_of_a_kill_form_another_group_on_another_store() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 3, ports[0]))
        first = total(rank)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RuntimeError) as caught:
            total(rank)
        assert is_broken(caught.value)
        group.leave()
        group.join(rendezvous(rank - 1, 2, ports[1], prefix="second"), number=1)
        return first, total(rank - 1), os.environ["RANK"], os.environ["WORLD_SIZE"]

    assert on_ranks(3, work) == [None, (6.0, 3.0, "0", "2"), (6.0, 3.0, "1", "2")]


def test_an_interrupt_ends_a_collective_that_waits_for_a_frozen_peer() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 2, ports[0]))
        total(rank)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        threading.Timer(0.5, group.interrupt, args=(1,)).start()
        with pytest.raises(RuntimeError) as caught:
            total(rank)
        assert is_broken(caught.value)
        group.leave()
        group.join(rendezvous(0, 1, ports[0], prefix="second"), number=1)
        return total(0)

    assert on_ranks(2, work, answering=1) == [1.0]  # the frozen rank says nothing


def test_an_interrupt_ends_the_wait_for_a_rank_that_does_not_come() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        threading.Timer(0.3, group.interrupt, args=(5,)).start()
        with pytest.raises(PeersLost, match="another group"):
            group.join(rendezvous(0, 2, ports[0]), number=4)
        return True

    assert on_ranks(1, work) == [True]


@pytest.mark.parametrize("host_of_the_store", ["dead", "frozen"])
def test_an_interrupt_ends_the_wait_for_a_store_that_does_not_answer(host_of_the_store: str) -> None:
    """The first rank is lost too, which the supervisor knew nothing of when it ordered the group."""
    gone = listen("127.0.0.1")
    port = gone.getsockname()[1]
    if host_of_the_store == "dead":
        gone.close()

    def work(rank: int, group: Group, ports: list[int]) -> Any:
        threading.Timer(0.5, group.interrupt, args=(2,)).start()
        with pytest.raises(PeersLost, match="another group"):
            group.join(rendezvous(1, 2, port), number=1)
        group.join(rendezvous(0, 1, ports[0], prefix="second"), number=2)
        return total(0)

    assert on_ranks(1, work) == [1.0]
    gone.close()


def test_an_interrupt_that_comes_before_the_forming_ends_it_too() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.interrupt(2)
        with pytest.raises(PeersLost, match="another group"):
            group.join(rendezvous(0, 2, ports[0]), number=1)
        group.join(rendezvous(0, 1, ports[0], prefix="second"), number=2)
        return total(0)

    assert on_ranks(1, work) == [1.0]


def test_an_interrupt_leaves_a_group_alone_that_is_new_enough() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 2, ports[0]), number=3)
        group.interrupt(3)
        return total(rank)

    assert on_ranks(2, work) == [3.0, 3.0]


def test_only_sockets_of_the_group_are_shut_down() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        other = listen("127.0.0.1")
        client = socket.create_connection(other.getsockname())
        server, _ = other.accept()
        group.join(rendezvous(rank, 2, ports[0]))
        group.interrupt(1)
        client.sendall(b"still there")
        return server.recv(20)

    assert on_ranks(2, work) == [b"still there", b"still there"]


def test_what_is_said_in_one_group_is_not_heard_in_the_next() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        totals = []
        for number in range(4):
            group.join(rendezvous(rank, 2, ports[0], prefix=f"group-{number}"), number=number)
            totals.append(total(rank))
            group.leave()
        return totals

    assert on_ranks(2, work) == [[3.0] * 4] * 2


def prepared_beside_work(group: Group, rank: int, meeting: Rendezvous) -> list[float]:
    """Prepare group 1 while this one adds up numbers; returns the sums. All ranks stop after the same one."""
    thread = threading.Thread(target=group.prepare, args=(meeting,), kwargs={"number": 1})
    thread.start()
    totals = []
    busy = torch.ones(1)
    while busy:
        totals.append(total(rank))
        busy[0] = float(thread.is_alive())
        dist.all_reduce(busy)
    return totals


def test_the_next_group_is_prepared_while_one_works() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        meeting = rendezvous(rank, 3, ports[0], prefix="second")
        totals = [3.0]
        if rank < 2:
            group.join(rendezvous(rank, 2, ports[0]))
            totals = prepared_beside_work(group, rank, meeting)
            group.leave()
        group.join(meeting, number=1)
        # Groups within it meet at the store: leaving the group before has not cut the way to it.
        pair = dist.new_group([0, 2])
        value = torch.ones(1)
        if rank != 1:
            dist.all_reduce(value, group=pair)
        return set(totals), total(rank), float(value)

    assert on_ranks(3, work) == [({3.0}, 6.0, 2.0), ({3.0}, 6.0, 1.0), ({3.0}, 6.0, 2.0)]


def test_an_interrupt_ends_what_is_prepared_and_the_group_at_work() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 2, ports[0]))
        total(rank)
        threading.Timer(0.3, group.interrupt, args=(2,)).start()
        with pytest.raises(PeersLost, match="another group"):  # rank 2 does not come
            group.prepare(rendezvous(rank, 3, ports[0], prefix="second"), number=1)
        with pytest.raises(RuntimeError) as caught:
            total(rank)
        assert is_broken(caught.value)
        group.leave()
        group.join(rendezvous(rank, 2, ports[0], prefix="third"), number=2)
        return total(rank)

    assert on_ranks(2, work) == [3.0, 3.0]


def test_a_rank_that_dies_while_it_is_connected_to_leaves_the_group_at_work_alone() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        meeting = rendezvous(rank, 3, ports[0], prefix="second")
        if rank == 2:
            store = dist.TCPStore("127.0.0.1", ports[0], is_master=False)
            dist.PrefixStore("second", store).set("here/2", "127.0.0.1 1")  # it comes, and connects to nobody
            os.kill(os.getpid(), signal.SIGKILL)
        group.join(rendezvous(rank, 2, ports[0]))
        thread = threading.Thread(target=group.prepare, args=(meeting,), kwargs={"number": 1}, daemon=True)
        threading.excepthook = lambda arguments: None
        thread.start()
        totals = {total(rank) for _ in range(200)}
        group.interrupt(2)
        group.leave()
        group.join(rendezvous(rank, 2, ports[0], prefix="third"), number=2)
        thread.join(PATIENCE_S)
        return totals, total(rank), thread.is_alive()

    assert on_ranks(3, work, answering=2) == [({3.0}, 3.0, False)] * 2


def test_what_is_prepared_too_late_is_not_begun() -> None:
    def work(rank: int, group: Group, ports: list[int]) -> Any:
        group.join(rendezvous(rank, 2, ports[0]), number=1)
        group.prepare(rendezvous(rank, 2, ports[0]), number=1)
        return total(rank)

    assert on_ranks(2, work) == [3.0, 3.0]


def test_sockets_are_known_by_their_ends() -> None:
    server = listen("127.0.0.1")
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    with server, client, accepted:
        found = {one.descriptor: one for one in tcp_sockets()}
        assert found[server.fileno()].listening
        assert found[server.fileno()].local_port == port
        mine = found[client.fileno()]
        assert (mine.remote_address, mine.remote_port, mine.listening) == ("127.0.0.1", port, False)
        shut_down([mine])
        assert accepted.recv(1) == b""
        accepted.sendall(b"x")


def test_a_connection_that_is_not_answered_yet_is_known_by_where_it_leads() -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # one connection waits to be accepted; to further ones nothing is answered
        clients = [stack.enter_context(socket.socket()) for _ in range(3)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        last = clients[-1]
        (found,) = [one for one in tcp_sockets() if one.descriptor == last.fileno()]
        assert found.connecting
        assert (found.remote_address, found.remote_port) == server.getsockname()
        shut_down([found])
        last.settimeout(5)
        with pytest.raises(OSError, match=r"\[Errno"):
            last.sendall(b"x")


def test_a_socket_that_took_the_number_of_another_is_left_alone() -> None:
    first = listen("127.0.0.1")
    (stale,) = [one for one in tcp_sockets() if one.descriptor == first.fileno()]
    number = first.fileno()
    first.close()
    left, right = socket.socketpair()
    try:
        if left.fileno() != number:
            os.dup2(left.fileno(), number)
        shut_down([stale])
        right.sendall(b"whole")
        left.settimeout(5)
        assert left.recv(5) == b"whole"
    finally:
        left.close()
        right.close()


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (PeersLost("gone"), True),
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo/ is a word"), False),
        (torch.OutOfMemoryError("no room"), False),
    ],
)
def test_what_breaks_a_group_is_told_from_what_a_rank_does_wrong(error: Exception, broken: bool) -> None:
    assert is_broken(error) is broken

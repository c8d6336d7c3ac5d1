"""Ranks, members and orders of the groups of a run."""

from __future__ import annotations

from runs import cpu_reading

from revdist.cluster.actor import Location
from revdist.cluster.groups import Groups
from revdist.training.orders import Inbox, Regroup, Rendezvous, Shares


def location(address: str, port: int) -> Location:
    reading = cpu_reading("cpu-0", uuid=f"CPU-{port}", host=address)
    return Location(host=address, address=address, pid=port, store_port=port, reading=reading)


HERE = [location("10.0.0.1", 1), location("10.0.0.1", 2), location("10.0.0.2", 3)]
SHARES = Shares(generation=4, by_rank=(5, 5), reason="lost")


def test_the_first_member_hosts_the_store_and_ranks_count_per_host() -> None:
    groups = Groups("run")
    meetings = groups.meet([0, 1, 2], HERE)
    assert [(m.rank, m.local_rank, m.world_size, m.host, m.port) for m in meetings] == [
        (0, 0, 3, "10.0.0.1", 1),
        (1, 1, 3, "10.0.0.1", 1),
        (2, 0, 3, "10.0.0.1", 1),
    ]
    assert {meeting.prefix for meeting in meetings} == {"run/0"}
    assert not groups.pending


def test_an_order_names_the_next_group_and_members_keep_their_numbers() -> None:
    groups = Groups("run")
    groups.meet([0, 1, 2], HERE)
    orders = groups.order([1, 2], HERE[1:], SHARES, orderly=False)
    assert sorted(orders) == [1, 2]
    assert (orders[1].number, orders[1].rendezvous.rank, orders[1].rendezvous.port) == (1, 0, 2)
    assert groups.members == (1, 2)
    assert [groups.rank_of(member) for member in (0, 1, 2, 7)] == [0, 0, 1, -1]
    assert groups.pending
    assert groups.working == (0, 1, 2)
    assert groups.entered(1)
    assert groups.working == (1, 2)
    assert not groups.entered(1)
    assert not groups.pending


def test_another_supervisor_counts_on() -> None:
    groups = Groups.taken_over("again", 6, (4, 2))
    assert (groups.number, groups.members, groups.pending) == (6, (4, 2), False)
    order = groups.order([4], HERE[:1], SHARES, orderly=False)[4]
    assert (order.number, order.rendezvous.prefix) == (7, "again/7")


def test_another_supervisor_leaves_the_ranks_of_lost_members_empty() -> None:
    """Steps that the first one had not heard of are reported by rank, the lost ones included."""
    groups = Groups.taken_over("again", 1, (None, 4, None, 2))
    assert groups.members == groups.working == (4, 2)
    assert [groups.rank_of(member) for member in (4, 2, 0)] == [1, 3, -1]
    assert groups.seats(1, 4) == (None, 4, None, 2)
    assert groups.seats(0, 3) == (None, None, None)
    groups.order([4, 2], HERE[:2], SHARES, orderly=False)
    assert groups.seats(2, 2) == (4, 2)


def order(number: int, generation: int, *, orderly: bool) -> Regroup:
    meeting = Rendezvous(host="", port=1, prefix="", rank=0, world_size=1)
    shares = Shares(generation=generation, by_rank=(10,), reason="lost")
    return Regroup(number=number, rendezvous=meeting, shares=shares, orderly=orderly)


def test_an_inbox_keeps_the_newest_order_and_interrupts_for_those_that_cannot_wait() -> None:
    inbox, interrupted = Inbox(), []
    inbox.interrupt = interrupted.append
    inbox.regroup(order(1, 3, orderly=True))
    assert (inbox.newest_group, interrupted) == (1, [])
    inbox.regroup(order(3, 5, orderly=False))
    inbox.regroup(order(2, 4, orderly=False))
    assert (inbox.newest_group, interrupted) == (3, [3])
    waited = inbox.wait_for_regroup(1, timeout_s=0)
    assert waited is not None
    assert waited.number == 3
    assert inbox.wait_for_regroup(3, timeout_s=0) is None


def test_an_orderly_order_is_agreed_on_only_once_this_rank_is_ready() -> None:
    inbox, prepared = Inbox(), []
    inbox.prepare = prepared.append
    inbox.regroup(order(1, 3, orderly=True))
    assert ([one.number for one in prepared], inbox.newest_group, inbox.ready_group) == ([1], 1, 0)
    inbox.is_ready(1)
    assert inbox.ready_group == 1
    inbox.regroup(order(2, 4, orderly=False))
    assert (len(prepared), inbox.ready_group) == (1, 2)


def test_shares_of_the_group_before_are_forgotten_on_entering_another() -> None:
    inbox = Inbox()
    for generation in (0, 1, 3):
        inbox.adopt(Shares(generation=generation, by_rank=(5, 5), reason="share"))
    assert inbox.newest_generation == 1
    late = Shares(generation=6, by_rank=(10,), reason="share")
    inbox.adopt(late)
    inbox.enter(order(1, 5, orderly=False))
    assert inbox.newest_generation == 6
    assert inbox.take(6) == late
    assert inbox.newest_shares == late

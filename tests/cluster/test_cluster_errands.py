"""Calls that nobody waits for: in their order, with what they return or raise, and beside one that blocks."""

from __future__ import annotations

import threading

import pytest

from revdist.cluster.errands import Errands


def test_calls_are_made_in_order_and_their_ends_can_be_told() -> None:
    errands, made = Errands(), []
    assert errands.wait(1)
    first = errands.send(lambda: made.append(1))
    failing = errands.send(lambda: 1 // 0)
    last = errands.send(lambda: made.append(2) or len(made))
    assert errands.wait(10)
    assert first.done()
    assert made == [1, 2]
    assert last.result() == 2
    with pytest.raises(ZeroDivisionError):
        failing.result()


def test_one_that_blocks_is_not_waited_for() -> None:
    errands, go_on = Errands(), threading.Event()
    blocked = errands.send(go_on.wait)
    behind = errands.send(lambda: "done")
    assert not errands.wait(0.1)
    assert not blocked.done()
    assert not behind.done()
    go_on.set()
    assert behind.result(timeout=10) == "done"

"""Orders, reports and the rows of the agreement: what is exchanged, and that none is lost."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revdist.training.agreement import mean_loss, must_redo, must_stop, next_generation
from revdist.training.orders import Inbox, Shares
from revdist.training.reports import EventReport, Outbox, ProfileReport, StepReport
from revdist.training.row import Row


def shares(generation: int) -> Shares:
    return Shares(generation=generation, by_rank=(1, 2), reason="start")


def report(number: int) -> ProfileReport:
    return ProfileReport(rank=0, device="CPU-1", done=number, total=9)


def step_report(step: int) -> StepReport:
    return StepReport(
        time=0.0, group=0, step=step, epoch=0, samples=0, loss=0.0, lr=0.1, step_s=0.1, pause_s=0.0, rows=()
    )


@given(st.integers(0, 2**53), st.booleans(), st.floats(0, 1e9), st.integers(0, 2**40))
def test_a_row_survives_as_numbers(samples: int, failed: bool, seconds: float, peak: int) -> None:
    row = Row(samples=samples, failed=failed, compute_s=seconds, peak_bytes=peak)
    assert Row.from_numbers(row.numbers()) == row


def test_ranks_decide_alike_from_the_same_rows() -> None:
    rows = [Row(samples=3, loss_sum=6.0, newest_generation=4), Row(samples=1, loss_sum=2.0, newest_generation=3)]
    assert not must_redo(rows)
    assert not must_stop(rows)
    assert next_generation(rows) == 3
    assert mean_loss(rows) == 2.0
    assert must_redo([*rows, Row(failed=True)])
    assert must_stop([*rows, Row(stop=True)])


def test_a_generation_counts_once_all_before_it_are_there() -> None:
    inbox = Inbox()
    inbox.adopt(shares(0))
    inbox.adopt(shares(2))
    assert inbox.newest_generation == 0
    inbox.adopt(shares(1))
    assert inbox.newest_generation == 2
    assert inbox.take(1) == shares(1)
    with pytest.raises(KeyError):
        inbox.take(0)


def test_waiting_for_the_first_shares_ends_with_them_or_with_a_stop() -> None:
    inbox = Inbox()
    threading.Timer(0.05, lambda: inbox.adopt(shares(0))).start()
    assert inbox.wait_for_first() == shares(0)
    inbox = Inbox()
    threading.Timer(0.05, lambda: inbox.stop("SIGTERM")).start()
    assert inbox.wait_for_first() is None
    assert inbox.stop_reason == "SIGTERM"


def test_reports_are_kept_until_they_are_acknowledged() -> None:
    outbox = Outbox()
    outbox.put(report(1))
    outbox.put(report(2))
    last, reports = outbox.read(0, timeout_s=0)
    assert reports == [report(1), report(2)]
    assert outbox.read(0, timeout_s=0) == (last, reports), "a reader that comes anew misses none"
    outbox.put(report(3))
    assert outbox.read(last, timeout_s=0)[1] == [report(3)]


def test_reports_of_steps_come_together_unless_another_is_urgent() -> None:
    """Read one by one, those of fast steps would wake the process that trains at every step."""
    outbox = Outbox()
    for step in (1, 2):
        outbox.put(step_report(step))
    threading.Timer(0.05, lambda: outbox.put(step_report(3))).start()
    last, reports = outbox.read(0, timeout_s=10)
    assert reports == [step_report(1), step_report(2), step_report(3)]
    outbox.put(step_report(4))
    outbox.put(event := EventReport(time=0.0, step=4, rank=0, device="CPU-1", kind="lost", detail=""))
    threading.Timer(0.1, lambda: outbox.put(step_report(6))).start()
    last, reports = outbox.read(last, timeout_s=10)
    assert reports == [step_report(4), event]
    assert outbox.read(last, timeout_s=10)[1] == [step_report(6)]


def test_a_reader_waits_for_the_next_report_and_not_after_the_end() -> None:
    outbox = Outbox()
    threading.Timer(0.05, lambda: outbox.put(report(1))).start()
    last, reports = outbox.read(0, timeout_s=10)
    assert reports == [report(1)]
    outbox.close()
    assert outbox.read(last, timeout_s=10) == (last, [])

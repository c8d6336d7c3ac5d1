from __future__ import annotations

from revdist.cluster.failure_lines import MAX_LINES, failure_lines
from revdist.errors import BudgetTooSmall, ConfigError, Preempted, RunFailed
from revdist.reporting.failure import failure_text


def test_a_failed_run_names_rank_host_cause_and_remedy() -> None:
    error = RunFailed("the optimizer step failed", rank=1, host="node-b", cause="disk full", remedy="free some space")
    assert failure_lines(error) == [
        "rank 1 on node-b: the optimizer step failed",
        "cause: disk full",
        "remedy: free some space",
    ]


def test_what_the_message_says_is_not_said_twice() -> None:
    error = RunFailed("rank 1 on node-b: disk full; free some space", rank=1, host="node-b", cause="disk full")
    assert failure_lines(error) == ["rank 1 on node-b: disk full", "free some space"]


def test_clauses_become_lines() -> None:
    first, second = failure_lines(BudgetTooSmall(2**20, 3 * 2**20, where="cpu-0"))
    assert first.startswith("budget 1.0 MiB is below the smallest possible plan, 3.0 MiB on cpu-0: 2.0 MiB missing")
    assert second == "lower micro_batch or free 2.0 MiB"


def test_five_lines_at_most_and_the_last_one_stays() -> None:
    lines = failure_lines(ConfigError("; ".join(f"key {index} is wrong" for index in range(9))))
    assert len(lines) == MAX_LINES
    assert lines[0] == "key 0 is wrong"
    assert lines[-2:] == ["... and 5 more", "key 8 is wrong"]


def test_our_own_bugs_say_that_they_are() -> None:
    first, second = failure_lines(KeyError("share\nmore"))
    assert first.startswith("KeyError: ")
    assert "revdist --traceback COMMAND ..." in second


def test_the_text_starts_with_the_word_error() -> None:
    assert failure_text(ConfigError("a; b")).plain == "error: a\n  b"


def test_leaving_in_order_is_no_error() -> None:
    assert failure_text(Preempted("saved at step 7; go on with --resume")).plain == (
        "saved at step 7\n  go on with --resume"
    )

"""Errors keep their facts across process borders."""

from __future__ import annotations

import inspect
import pickle

import pytest

from revdist import errors
from revdist.errors import BudgetTooSmall, RevdistError, RunFailed, UsageError, format_bytes

TREE = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, RevdistError)]


@pytest.mark.parametrize("cls", [cls for cls in TREE if cls is not BudgetTooSmall])
def test_every_error_pickles_with_its_facts(cls: type[RevdistError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("what happened", rank=3, remedy="do this")))
    assert type(copy) is cls
    assert (str(copy), copy.facts) == ("what happened", {"rank": 3, "remedy": "do this"})
    assert copy.rank == 3  # type: ignore[attr-defined]


def test_a_budget_that_is_too_small_says_how_much_is_missing() -> None:
    error = pickle.loads(pickle.dumps(BudgetTooSmall(2**20, 3 * 2**20, where="cpu-0")))
    assert error.missing_bytes == 2 * 2**20
    assert str(error) == (
        "budget 1.0 MiB is below the smallest possible plan, 3.0 MiB on cpu-0: 2.0 MiB missing; "
        "lower micro_batch or free 2.0 MiB"
    )


def test_wrong_usage_exits_with_2_and_a_failed_run_with_1() -> None:
    assert all(
        cls.exit_code == (2 if issubclass(cls, UsageError) else 1) for cls in TREE if cls is not errors.Preempted
    )
    assert errors.Preempted.exit_code == 143
    assert issubclass(errors.Preempted, RunFailed)


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    missing = [cls.__name__ for cls in TREE if cls.__name__ not in errors.__doc__]
    assert missing == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (48 * 2**20, "48.0 MiB"), (2**50, "1024.0 TiB")],
)
def test_bytes_read_as_people_write_them(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text

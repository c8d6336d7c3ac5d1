"""A process leaves with the exit code it was ending with, also where something would hold it up."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENDS = """
import atexit, os, sys
from revdist.cluster.way_out import expect_to_be_held_up, leave
atexit.register(os._exit, 99)  # as Ray ends a process
if {held_up}:
    expect_to_be_held_up()
sys.stdout.write("said")
leave(SystemExit({code}))
"""


@pytest.mark.parametrize(("code", "left_with"), [(143, 143), (0, 0), (None, 0), ("'trouble'", 1)])
def test_nothing_holds_up_one_that_expects_it(code: object, left_with: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(held_up=True, code=code)], stdout=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stdout) == (left_with, "said")


def test_others_leave_as_python_does() -> None:
    assert subprocess.run([sys.executable, "-c", ENDS.format(held_up=False, code=143)]).returncode == 99

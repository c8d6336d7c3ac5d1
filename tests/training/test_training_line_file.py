"""Lines are whole, and a full disk loses none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from revdist.training.line_file import LineFile

LIMITED = """
import resource, sys
from pathlib import Path
from revdist.training.line_file import LineFile

def limit(num_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

path = Path(sys.argv[1])
file = LineFile(path)
limit(25)
for number in range(5):
    file.append(f"line {number} of five")
assert path.stat().st_size == 25, path.read_text()
limit(60)
file.append("and one more")
assert path.stat().st_size == 60, path.read_text()
limit(resource.RLIM_INFINITY)
file.close()
"""


def test_lines_that_the_disk_refuses_come_later_in_order(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "lines")], check=True)
    assert (tmp_path / "lines").read_text().splitlines() == [*(f"line {n} of five" for n in range(5)), "and one more"]


@pytest.mark.parametrize("whole", ["", "one\ntwo\n", "one\n" + "two" * 50_000 + "\n"])
@pytest.mark.parametrize("half", ["", '{"step": 3, "lo', "x" * 100_000])
def test_half_a_line_is_cut_off_when_the_file_grows_again(whole: str, half: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(whole + half)
    file = LineFile(path)
    file.append("three")
    file.close()
    assert path.read_text() == whole + "three\n"

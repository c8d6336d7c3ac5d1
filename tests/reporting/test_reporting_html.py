from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_run import START, event, write_run

from revdist.errors import UsageError
from revdist.reporting.html import write_report


class Page(HTMLParser):
    """Collects what a browser would load and run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_report_needs_nothing_beside_it_and_runs_no_code(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", steps=60)).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert len(page.addresses) == 2
    for address in page.addresses:
        svg = base64.b64decode(address.removeprefix("data:image/svg+xml;base64,"))
        assert svg.startswith(b"<?xml")


def test_a_report_says_what_the_run_came_to(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", steps=60)).read_text()
    for part in ("98.33%", "1.31 times as fast as an equal split", "less memory is free", "global_batch: 64"):
        assert part in text
    assert len(re.findall(r'class="strip"', text)) == 5


def test_a_run_that_was_cut_off_has_a_report_too(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", steps=60, finished=False)).read_text()
    assert "not finished" in text
    assert "data:image/svg+xml" in text


def test_a_run_without_a_step_has_a_report_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=60)
    for name in ("metrics.jsonl", "plans.jsonl", "events.jsonl", "summary.json"):
        (run_dir / name).unlink()
    assert "No step has been done yet" in write_report(run_dir).read_text()


def test_a_run_with_damaged_lines_has_a_report_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=20)
    (run_dir / "plans.jsonl").unlink()
    for name in ("metrics", "events"):
        with (run_dir / f"{name}.jsonl").open("ab") as file:
            file.write(b'{"time": 1.0, "st\n\xff\n3\n{"step": 21, "kind": "end"}\n')
    (run_dir / "summary.json").write_text('{"steps": 2')
    text = write_report(run_dir).read_text()
    assert "not finished" in text
    assert "data:image/svg+xml" in text


def test_nothing_is_written_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_report_counts_who_was_lost_and_the_time_it_cost(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=20, finished=True)
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(event(20, "lost", rank=1, device="CPU-0001", detail="killed by signal 9")) + "\n")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"time": START + 3, "step": 21, "step_s": 1, "pause_s": 0.25, "ranks": []}) + "\n")
    text = re.sub(r"<[^>]*>|\s+", " ", write_report(run_dir).read_text())
    assert re.search(r"lost\s+1\b|1\s+lost", text)
    assert "250 ms" in text
    assert "killed by signal 9" in text

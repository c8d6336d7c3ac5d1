"""What ranks print, from files that grow to one file per rank."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from runs import Watcher, settings

import revdist
from revdist.cluster.logs import TICK_BYTES, LogFiles, LogGatherer, Tail, rest_of
from revdist.cluster.observer import Observer
from revdist.training.reports import LogReport
from revdist.training.run_directory import RunReader

HOST = socket.gethostname()


class Heard(Observer):
    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []

    def on_log(self, rank: int, text: str) -> None:
        self.said.append((rank, text))


def report(text: str, *, host: str = HOST, **read_to: int) -> LogReport:
    return LogReport(text=text, host=host, read_to=read_to)


def test_a_tail_reads_whole_lines_once_and_not_ray_s_marks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(":job_id:01000000\n:actor_name:ReplicaActor\nfirst\nsec")
    tail = Tail({str(log): 0})
    assert tail.read() == "first\n"
    assert tail.read() == ""
    with log.open("a") as file:
        file.write("ond\n\xff\n")
    assert tail.read() == "second\n\xff\n"


def test_a_tail_sends_so_much_at_a_time_and_skips_what_is_far_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x" * 99 + "\n")
    tail = Tail({str(log): 0})
    with log.open("a") as file:
        file.write(("y" * 99 + "\n") * 2000)
    first = tail.read()
    assert len(first) <= TICK_BYTES
    assert first.startswith("x")
    with log.open("a") as file:
        file.write(("z" * 99 + "\n") * 30000)
    text = tail.read_all()
    assert "bytes left out here" in text.splitlines()[0]
    assert str(log) in text.splitlines()[0]
    assert text.endswith("z\n")
    assert len(text) < 2 * TICK_BYTES


def test_a_process_knows_the_files_of_its_output(tmp_path: Path) -> None:
    code = "from revdist.cluster.logs import Tail; print(*Tail.of_this_process().read_to, flush=True)"
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err, check=True, timeout=60)
    assert (tmp_path / "out").read_text().split() == [str(tmp_path / "out"), str(tmp_path / "err")]


def test_last_words_of_a_process_are_read_from_its_files_where_they_are_here(tmp_path: Path) -> None:
    log, heard = tmp_path / "log", Heard()
    log.write_text("one\ntwo\n")
    gatherer = LogGatherer(heard)
    gatherer.take(7, 1, LogReport(text="one\n", host=HOST, read_to={str(log): 4}))
    gatherer.take(8, 2, LogReport(text="", host="elsewhere", read_to={str(log): 0}))
    gatherer.lost(7, 1)
    gatherer.lost(8, 2)
    gatherer.lost(9, 3)
    assert heard.said == [(1, "one\n"), (1, "two\n")]


def test_what_a_newcomer_prints_waits_until_it_has_a_rank() -> None:
    heard = Heard()
    gatherer = LogGatherer(heard)
    gatherer.take(5, -1, report("joining\n"))
    gatherer.take(5, -1, report(""))
    assert heard.said == []
    gatherer.take(5, 1, report("training\n"))
    assert heard.said == [(1, "joining\ntraining\n")]


def test_the_rest_begins_where_a_report_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\nthree\n")
    rest = rest_of(LogReport(text="one\n", host=HOST, read_to={str(log): 4}))
    assert rest.text == "two\nthree\n"
    assert rest_of(rest).text == ""


def test_nothing_is_on_disk_before_the_run_has_begun(tmp_path: Path) -> None:
    files = LogFiles(tmp_path / "logs")
    files.on_start(tmp_path, [])
    files.on_log(0, "early\n")
    assert not (tmp_path / "logs").exists()
    files.on_event({"kind": "profile"})
    files.on_event({"kind": "start"})
    files.on_log(0, "late")
    files.on_log(1, "other\n")
    files.close()
    assert (tmp_path / "logs" / "rank-0.log").read_text() == "early\nlate\n"
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "other\n"
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "logs" / "rank-0.log").stat().st_mode & 0o777 == 0o640


def test_a_supervisor_that_takes_over_goes_on_where_files_end(tmp_path: Path) -> None:
    for kind, text in (("start", "one\n"), ("supervisor", "two\n")):
        files = LogFiles(tmp_path)
        files.on_event({"kind": kind})
        files.on_log(0, text)
        files.close()
    assert (tmp_path / "rank-0.log").read_text() == "one\ntwo\n"


@pytest.mark.usefixtures("devices_folder", "running_ray")
def test_each_rank_has_a_file_with_all_that_its_process_printed(tmp_path: Path) -> None:
    class Listener(Watcher):
        def __init__(self) -> None:
            super().__init__()
            self.said: dict[int, str] = {}

        def on_log(self, rank: int, text: str) -> None:
            self.said[rank] = self.said.get(rank, "") + text

    listener = Listener()
    changes = {"model": {"factory": "talkative_models:classifier"}}
    trainer = revdist.Trainer(
        settings(**changes), observer=listener, run_dir=tmp_path / "run", log_dir=tmp_path / "logs"
    )
    trainer.fit()
    assert ray.is_initialized()
    assert len(list(RunReader(tmp_path / "run").metrics())) == 10
    for rank in (0, 1):
        text = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert f"built by rank {rank} of 2, local rank {rank}" in text
        assert "a warning of user code" in text
        assert "a logged line" in text
        assert "raw bytes" in text
        assert text == listener.said[rank]

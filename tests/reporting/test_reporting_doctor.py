from __future__ import annotations

import io

import pytest
from rich.console import Console

from revdist.cluster import local
from revdist.devices.doctor import Finding
from revdist.reporting.doctor import examine, findings_table

FINDINGS = [
    Finding(name="clock", status="ok", found="synchronised"),
    Finding(name="shared memory", status="warn", found="32.0 MiB free", remedy="give it more"),
    Finding(name="loopback", status="fail", found="cannot be reached", remedy="bring up lo"),
]


def test_every_finding_shows_its_status_and_its_remedy() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(findings_table(FINDINGS))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [line[0] for line in lines if line] == ["ok", "warn", "give", "FAIL", "bring"]


def test_a_cluster_that_is_not_there_is_a_finding_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_is_connected", lambda: False)  # whatever Ray another test left this process with
    last = examine("127.0.0.1:1")[-1]
    assert (last.name, last.status) == ("Ray cluster", "fail")
    assert "ray start --head" in last.remedy

"""The Ray head is lost for good: the run saves before Ray ends it, and goes on from there in another cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harm import SLOW, launch, wait_for_steps, wait_until
from runs import settings

from revdist.cluster.head import HeadWatch
from revdist.errors import ConfigError
from revdist.training.network import listen
from revdist.training.run_directory import RunReader

pytestmark = pytest.mark.usefixtures("devices_folder")


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with listen("127.0.0.1") as listener:
        yield listener


def test_a_head_that_does_not_answer_for_long_is_gone(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "4")
    host, port = head.getsockname()
    with HeadWatch(f"{host}:{port}") as watch:
        reason = watch.or_gone(lambda: None)
        time.sleep(2.5)
        assert reason() is None
        head.close()
        wait_until(lambda: reason() is not None, "the head is not missed")
        assert f"{host}:{port}" in str(reason())
        assert watch.or_gone(lambda: "SIGTERM")() == "SIGTERM"


def test_patience_is_configured_and_ends_before_rays(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "4")
    host, port = head.getsockname()
    with pytest.raises(ConfigError, match=r"faults.head_s is 4, and Ray ends all processes 4 s after"):
        HeadWatch(f"{host}:{port}", patience_s=4)
    with HeadWatch(f"{host}:{port}", patience_s=1.5) as watch:
        head.close()
        wait_until(lambda: watch.is_gone, "the head is not missed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_saves_when_its_head_is_lost_and_is_taken_up_in_another_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    config, run_dir = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(json.dumps(settings(data=SLOW, epochs=None, steps=5000)))
    process = launch(config, run_dir)
    wait_for_steps(run_dir, 5, process)
    (gcs,) = [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "gcs_server"]
    os.kill(gcs.pid, signal.SIGKILL)
    output = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 143, output
    assert "the loss of the Ray head" in output
    taken = [step["step"] for step in RunReader(run_dir).metrics()]
    assert taken == list(range(1, len(taken) + 1))
    again = launch(config, run_dir, "--resume", f"steps={len(taken) + 3}")
    output = again.communicate(timeout=100)[0].decode()
    assert again.returncode == 0, output
    assert [step["step"] for step in RunReader(run_dir).metrics()] == list(range(1, len(taken) + 4))

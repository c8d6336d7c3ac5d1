"""`ray job submit`, for real: revdist as an ordinary job of a Ray cluster that knows nothing of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import settings

import revdist
from revdist.cluster.address import check_reachable
from revdist.cluster.processes import writing_below
from revdist.errors import AddressUnreachable
from revdist.training.run_directory import RunReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(revdist.__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture
def environment(tmp_path: Path, devices_folder: Path) -> dict[str, str]:
    """A home and a token of its own; modules of the job come with its working directory."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """The address that jobs are submitted to, of a head in a session of its own."""
    port, dashboard_port, *agent_ports = free_ports(4)
    folder = tempfile.mkdtemp(prefix="rj-")  # Ray's socket paths must stay short
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
    command += [f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={agent_ports[0]}", f"--dashboard-agent-grpc-port={agent_ports[1]}"]
    log = Path(folder) / "start.log"
    with log.open("w") as file:
        head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=file, stderr=file)
    try:
        until_s = time.monotonic() + 90
        while not reachable(f"127.0.0.1:{port}") or not listens(dashboard_port):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < until_s, log.read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{dashboard_port}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(timeout=30)
        for process in writing_below(folder):
            process.send(signal.SIGKILL)


def reachable(address: str) -> bool:
    try:
        check_reachable(address)
    except AddressUnreachable:
        return False
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def submit(dashboard: str, folder: Path, *more: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit `revdist launch small.yaml` with a folder as its working directory, and wait for its end."""
    launch = [sys.executable, "-m", "revdist.cli", "launch", "small.yaml", "--address", "auto", *more]
    command = [RAY, "job", "submit", "--address", dashboard, "--working-dir", str(folder), "--", *launch]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_a_submitted_job_trains_and_leaves_the_cluster_as_it_was(
    tmp_path: Path, dashboard: str, environment: dict[str, str]
) -> None:
    folder, run_dir = tmp_path / "job", tmp_path / "run"
    folder.mkdir()
    (folder / "small.yaml").write_text(json.dumps(settings()))
    (folder / "small_models.py").write_text((ROOT / "tests" / "training" / "small_models.py").read_text())
    launch = [
        sys.executable,
        "-m",
        "revdist.cli",
        "launch",
        "small.yaml",
        "--address",
        "auto",
        "--run-dir",
        str(run_dir),
    ]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", dashboard, "--working-dir", str(folder), "--", *launch],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert len(list(RunReader(run_dir).metrics())) == 10
    listed = subprocess.run(
        [RAY, "job", "list", "--address", dashboard], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "SUCCEEDED" in listed.stdout


def test_a_failed_run_fails_its_job_and_says_why_in_its_log(
    tmp_path: Path, dashboard: str, environment: dict[str, str]
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "small.yaml").write_text(json.dumps(settings(model={"factory": "nowhere:model"})))
    (tmp_path / "job" / "small_models.py").write_text((ROOT / "tests" / "training" / "small_models.py").read_text())
    done = submit(dashboard, tmp_path / "job", environment=environment)
    assert done.returncode != 0
    assert "error: cannot import nowhere:model: no module 'nowhere'" in done.stdout + done.stderr

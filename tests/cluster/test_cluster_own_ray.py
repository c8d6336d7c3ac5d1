"""Clusters of a run's own, and given ones: reached, private, and gone or untouched afterwards."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs import settings

from revdist.cluster.address import check_reachable
from revdist.training.run_directory import RunReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent / "training"), str(HERE.parent.parent)])

OURS = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
"""Without the settings of another test's cluster."""

LOOK_AROUND = """
import json, os, psutil, sys
from revdist.cluster.local import ray_cluster
import ray  # before the cluster starts, as a notebook may have it
with ray_cluster(None, num_workers=1) as own:
    family = psutil.Process().children(recursive=True)
    listening = [c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    facts = {"own": own, "addresses": sorted(set(listening)), "pids": [p.pid for p in family]}
    facts |= {"commands": [" ".join(p.cmdline()) for p in family], "loaded": [*sys.modules]}
print(json.dumps({**facts, "after": [name for name in os.environ if name.startswith("RAY_AUTH")]}))
"""


def python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**OURS, "PYTHONPATH": PATH, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_local_cluster_is_on_loopback_with_a_token_in_no_file_and_gone_afterwards(tmp_path: Path) -> None:
    done = python("-c", LOOK_AROUND, HOME=str(tmp_path))
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["own"]
    assert {address.removeprefix("::ffff:") for address in facts["addresses"]} == {"127.0.0.1"}
    assert facts["after"] == []
    assert not (tmp_path / ".ray").exists()
    assert not [pid for pid in facts["pids"] if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_a_local_cluster_has_no_more_than_a_run_uses() -> None:
    facts = json.loads(python("-c", LOOK_AROUND).stdout.splitlines()[-1])
    left_out = ("dashboard/dashboard.py", "log_monitor.py", "autoscaler/_private/monitor.py")
    assert [command for command in facts["commands"] if any(name in command for name in left_out)] == []
    assert any("gcs_server" in command for command in facts["commands"])
    assert "aiohttp" not in facts["loaded"]  # half a second of the driver's, when it only asks whether it is there


@pytest.fixture(params=[False, True], ids=["open", "with a token"])
def ray_address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A cluster that `ray start` started, in a home of its own."""
    if request.param:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = set(psutil.pids())
    environment = {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    temp_dir = Path("/tmp") / f"ray-test-{port}"  # sockets below it need a short path
    command = ["-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--include-dashboard=false"]
    started = python(*command, "--num-cpus=2", f"--temp-dir={temp_dir}", **environment)
    assert started.returncode == 0, started.stdout + started.stderr
    yield f"127.0.0.1:{port}"
    started_since = [psutil.Process(pid) for pid in set(psutil.pids()) - before if psutil.pid_exists(pid)]
    ours = [process for process in started_since if str(temp_dir) in " ".join(_command_line(process))]
    for process in ours:
        process.terminate()
    _, alive = psutil.wait_procs(ours, timeout=10)
    for process in alive:
        process.kill()


def test_a_run_uses_the_cluster_at_an_address_and_leaves_it_running(
    ray_address: str, tmp_path: Path, devices_folder: Path
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(settings()))
    command = ["-m", "revdist.cli", "launch", str(config), "--address", ray_address]
    done = python(*command, "--run-dir", str(tmp_path / "run"), HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(RunReader(tmp_path / "run").metrics())) == 10
    check_reachable(ray_address)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []

"""Commands that look at a running Ray cluster, on a real one of their own."""

from __future__ import annotations

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

from revdist.devices.cpu import CpuDevice

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A token of its own, and devices that no other test sees."""
    folder = tmp_path_factory.mktemp("devices")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **token, "REVDIST_DEVICES_DIR": str(folder), "COLUMNS": "120"}


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """A Ray head in a process group of its own, ended as a whole."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="rd-")  # Ray's socket paths must stay short
    command = ["start", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", "--block"]
    ray = Path(sys.executable).with_name("ray")
    head = subprocess.Popen(
        [str(ray), *command, "--node-ip-address=127.0.0.1", "--num-cpus=1"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(timeout=30)


def revdist(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "revdist.cli", *arguments], env=env, capture_output=True, text=True, timeout=120
    )


def until_up(address: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The first answer of `revdist devices`: the head takes its time to start."""
    deadline = time.monotonic() + 90
    while True:
        done = revdist("devices", "--address", address, env=env)
        if done.returncode == 0 or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_devices_of_a_cluster_are_listed_and_its_health_is_told(address: str, environment: dict[str, str]) -> None:
    CpuDevice.open("cluster-device", capacity_bytes=64 * 2**20, directory=environment["REVDIST_DEVICES_DIR"])
    listed = until_up(address, environment)
    assert listed.returncode == 0, listed.stderr
    assert "cluster-device" in listed.stdout
    assert "64.0 MiB" in listed.stdout
    told = revdist("doctor", "--address", address, env=environment)
    assert f"1 devices on 1 host at {address}" in " ".join(told.stdout.split())


def test_without_the_token_nothing_is_told(address: str, environment: dict[str, str]) -> None:
    until_up(address, environment)
    refused = revdist("devices", "--address", address, env={**environment, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    assert refused.returncode != 0
    assert "cluster-device" not in refused.stdout
    assert "refuses the token in RAY_AUTH_TOKEN" in refused.stderr

"""What the doctor says about Ray on a machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from revdist.cluster import doctor


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without a token, and an environment that says nothing about tokens."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_the_installed_ray_is_fine() -> None:
    finding = doctor.check_version()
    assert finding.status == "ok"
    assert importlib.metadata.version("ray") in finding.found


def test_an_old_ray_a_missing_one_and_missing_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (doctor.check_version().status, "jobs" in doctor.check_version().found) == ("warn", True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.3")
    assert doctor.check_version().status == "fail"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert doctor.check_version().found == "not installed"


def test_a_token_is_said_to_be_there_missing_unsent_or_open_to_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_token().status == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert (doctor.check_token().status, "get-auth-token" in doctor.check_token().remedy) == ("warn", True)
    path = home / ".ray" / "auth_token"
    path.write_text("secret")
    path.chmod(0o600)
    assert (doctor.check_token().status, str(path) in doctor.check_token().found) == ("ok", True)
    path.chmod(0o644)
    assert doctor.check_token().remedy == f"chmod 600 {path}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "keeps from being sent" in doctor.check_token().found
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.check_token().status == "fail"
    assert "secret" not in doctor.check_token().found


def test_a_port_is_free_or_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"-ERR unknown command\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        taken = doctor.check_port(port)
        thread.join()
    assert (taken.status, f"--port={port + 1}" in taken.remedy) == ("warn", True)
    assert doctor.check_port(port).status == "ok"


def test_it_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from revdist.reporting.doctor import examine; examine(None)\n"
        "assert not {'ray', 'torch', 'grpc'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

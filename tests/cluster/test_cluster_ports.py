"""What a run lets the world do: listens on loopback alone, writes what others cannot change, reads no code."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import Watcher, settings

import revdist
from revdist.cluster.inventory import cluster_devices
from revdist.cluster.local import session_folder
from revdist.cluster.session import new_session_root, remove_session
from revdist.config import RunConfig
from revdist.errors import ConfigError, UsageError

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def family() -> Iterator[psutil.Process]:
    """This process and all below it: Ray's servers, agents and workers."""
    yield psutil.Process()
    yield from psutil.Process().children(recursive=True)


def open_ports() -> dict[tuple[str, str, int], str]:
    """Every socket of the family that takes connections or packets: (kind, address, port) and whose it is."""
    found = {}
    for process in family():
        try:
            connections, name = process.net_connections("inet"), process.name()
        except psutil.Error:
            continue
        for one in connections:
            udp = one.type == 2 and one.laddr and not one.raddr
            if one.status == psutil.CONN_LISTEN or udp:
                found["udp" if udp else "tcp", one.laddr.ip, one.laddr.port] = name
    return found


@pytest.mark.usefixtures("devices_folder", "running_ray")
def test_nothing_of_a_run_listens_beyond_loopback_and_others_can_change_none_of_it(tmp_path: Path) -> None:
    seen: dict[tuple[str, str, int], str] = {}

    def look(step: int) -> None:
        if step in (1, 5, 10):
            seen.update(open_ports())

    result = revdist.Trainer(settings(), observer=Watcher(look), run_dir=tmp_path / "run").fit()
    public = {port: name for port, name in seen.items() if port[1] not in LOOPBACK}
    assert not public
    names = " ".join(seen.values())
    for part in ("gcs_server", "raylet", "ray::Replica"):  # it did see Ray's servers, and the ranks' own sockets
        assert part in names
    for path in (result.run_dir, *result.run_dir.rglob("*")):
        assert not path.stat().st_mode & stat.S_IWOTH, path
    assert result.run_dir.stat().st_mode & 0o777 == 0o750
    devices = Path(os.environ["REVDIST_DEVICES_DIR"])
    assert devices.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("running_ray")
def test_sockets_and_logs_of_ray_lie_where_nobody_else_gets() -> None:
    root = Path(session_folder()).parent
    assert root.parent.stat().st_mode & 0o777 == 0o700
    assert root.parent.stat().st_uid == os.getuid()
    for process in family():  # not an assumption about Ray: its processes' own sockets
        for one in process.net_connections("unix"):
            if "/sockets/" in str(one.laddr):
                assert str(one.laddr).startswith(f"{root}/")


def test_a_folder_of_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"revdist-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="belongs to another user"):
        new_session_root()


def test_only_sessions_of_a_run_s_own_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    own, other = new_session_root(), tmp_path / "ray"
    for root in (own, other):
        (root / "session_1" / "logs").mkdir(parents=True)
        remove_session(root / "session_1")
    assert not own.exists()
    assert other.exists()


@pytest.mark.usefixtures("devices_folder", "running_ray")
def test_looking_at_devices_opens_nothing_either() -> None:
    with cluster_devices("auto") as read:
        read()
        assert {address for _, address, _ in open_ports()} <= LOOPBACK


CODE = (
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:subprocess.Popen [[touch, '{}']]",
    "!!python/name:os.system",
)


@pytest.mark.parametrize("value", CODE)
def test_reading_a_configuration_runs_no_code(tmp_path: Path, value: str) -> None:
    touched, path = tmp_path / "touched", tmp_path / "run.yaml"
    path.write_text(f"name: {value.format(touched)}\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        RunConfig.from_yaml(path)
    path.write_text(json.dumps(settings()))
    with pytest.raises(ConfigError, match="is not YAML"):
        RunConfig.from_yaml(path, [f"name={value.format(touched)}"])
    assert not touched.exists()


def test_reading_a_configuration_imports_nothing_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\ndef model(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    values: dict[str, Any] = settings(model={"factory": "evil:model"})
    revdist.Trainer(RunConfig.from_mapping(values), run_dir=tmp_path / "run").check()
    assert not (tmp_path / "touched").exists()

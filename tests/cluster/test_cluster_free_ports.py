"""Ports for later listeners are free, and not such as the kernel gives to connections meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from revdist.cluster import ports


def test_ports_are_free_and_not_given_to_connections() -> None:
    found = ports.free_ports(4)
    assert len(set(found)) == 4
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in found:
        assert 1024 < port < first_given
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = tmp_path / "range"
    given.write_text("21000 60999")
    monkeypatch.setattr(ports, "_GIVEN_BY_KERNEL", given)
    monkeypatch.setattr(ports, "_is_free", lambda port: port % 2 == 0)
    assert all(port % 2 == 0 for port in ports.free_ports(4))
    monkeypatch.setattr(ports, "_is_free", lambda port: False)
    assert ports.free_ports(4) == []


def test_there_are_none_where_the_kernel_gives_all_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = tmp_path / "range"
    given.write_text("1024 65535")
    monkeypatch.setattr(ports, "_GIVEN_BY_KERNEL", given)
    assert ports.free_ports(1) == []
    monkeypatch.setattr(ports, "_GIVEN_BY_KERNEL", tmp_path / "missing")
    assert ports.free_ports(1) == []

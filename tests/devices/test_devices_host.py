"""The memory that a host has free, as its control groups tell it."""

from __future__ import annotations

from pathlib import Path

import pytest

from revdist.devices import host

MIB = 2**20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /sys/fs/cgroup."""
    monkeypatch.setattr(host, "_GROUPS", tmp_path)
    monkeypatch.setattr(host, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "_memory_limits", host._memory_limits.__wrapped__)  # nothing is remembered
    return tmp_path


def test_files_cached_in_a_container_count_as_free(groups: Path) -> None:
    (groups / "own").write_text("0::/above/here\n")
    here = groups / "above" / "here"
    here.mkdir(parents=True)
    (here / "memory.max").write_text(f"{64 * MIB}\n")
    (here / "memory.current").write_text(f"{60 * MIB}\n")
    assert host.host_memory() == (64 * MIB, 4 * MIB)
    lines = f"anon {20 * MIB}\nfile {40 * MIB}\ninactive_file {30 * MIB}\nactive_file {8 * MIB}\n"
    (here / "memory.stat").write_text(lines)
    assert host.host_memory() == (64 * MIB, 42 * MIB)
    (here.parent / "memory.max").write_text("max\n")
    assert host.host_memory() == (64 * MIB, 42 * MIB)
    (here / "memory.current").write_text("0\n")  # read a moment before the statistics
    assert host.host_memory() == (64 * MIB, 64 * MIB)


def test_version_1_counts_the_files_of_a_groups_children_too(groups: Path) -> None:
    (groups / "own").write_text("5:devices:/here\n4:memory:/here\n0::/\n")
    here = groups / "memory" / "here"
    here.mkdir(parents=True)
    (here / "memory.limit_in_bytes").write_text(f"{64 * MIB}\n")
    (here / "memory.usage_in_bytes").write_text(f"{60 * MIB}\n")
    own, with_children = (30 * MIB, 8 * MIB), (40 * MIB, 10 * MIB)
    lines = "inactive_file {}\nactive_file {}\n".format(*own)
    lines += "total_inactive_file {}\ntotal_active_file {}\n".format(*with_children)
    (here / "memory.stat").write_text(lines)
    assert host.host_memory() == (64 * MIB, 54 * MIB)

"""The ledger file: its layout, who creates it, and who has which slot."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from revdist.devices import host, ledger
from revdist.devices.build import NATIVE
from revdist.devices.ledger import Ledger, ledger_path, ledger_paths
from revdist.errors import DeviceError, DeviceNotFound, UsageError

MIB = 2**20
_PRINT_LAYOUT = """
#include <stddef.h>
#include "ledger.h"
#define P(type, field) printf("%zu ", offsetof(type, field))
int main(void) {
  P(revdist_ledger, version); P(revdist_ledger, num_slots); P(revdist_ledger, capacity_bytes);
  P(revdist_ledger, num_used_slots); P(revdist_ledger, uuid); P(revdist_ledger, name); P(revdist_ledger, slots);
  P(revdist_slot, pid_namespace); P(revdist_slot, current_bytes); P(revdist_slot, peak_bytes);
  P(revdist_slot, unenforced); P(revdist_slot, name);
  printf("%zu %zu %llu\\n", sizeof(revdist_ledger), sizeof(revdist_slot), REVDIST_LEDGER_MAGIC);
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_python_and_c_see_one_layout(tmp_path: Path) -> None:
    source = tmp_path / "layout.c"
    source.write_text(_PRINT_LAYOUT)
    subprocess.run(["gcc", f"-I{NATIVE}", str(source), "-o", str(tmp_path / "layout")], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout
    file, slot = ledger._File, ledger._Slot
    fields = [file.version, file.num_slots, file.capacity_bytes, file.num_used_slots, file.uuid, file.name, file.slots]
    fields += [slot.pid_namespace, slot.current_bytes, slot.peak_bytes, slot.unenforced, slot.name]
    sizes = [ledger.ctypes.sizeof(file), ledger.ctypes.sizeof(slot), ledger.MAGIC]
    assert [int(word) for word in printed.split()] == [*(field.offset for field in fields), *sizes]


def test_a_device_keeps_its_uuid_when_it_is_made_again(devices_folder: Path) -> None:
    first = Ledger.create(ledger_path("cpu-0"), 48 * MIB)
    uuid = first.uuid
    first.remove()
    assert ledger_paths() == []
    assert Ledger.create(ledger_path("cpu-0"), 96 * MIB).uuid == uuid
    assert Ledger.create(ledger_path("cpu-1"), 96 * MIB).uuid != uuid


def test_ledgers_are_private_and_listed_by_number(devices_folder: Path) -> None:
    for name in ("cpu-10", "cpu-2", "big"):
        Ledger.create(ledger_path(name), MIB)
    assert [path.stem for path in ledger_paths()] == ["big", "cpu-2", "cpu-10"]
    assert devices_folder.stat().st_mode & 0o777 == 0o700
    assert ledger_path("big").stat().st_mode & 0o077 == 0


def test_an_unused_device_takes_a_new_capacity(devices_folder: Path) -> None:
    Ledger.create(ledger_path("cpu-0"), 48 * MIB)
    assert Ledger.create(ledger_path("cpu-0"), 96 * MIB).capacity_bytes == 96 * MIB
    assert Ledger(ledger_path("cpu-0")).capacity_bytes == 96 * MIB


def test_a_device_in_use_keeps_its_capacity_and_its_file(devices_folder: Path) -> None:
    device = Ledger.create(ledger_path("cpu-0"), 48 * MIB)
    device.claim_slot("this process does not count")
    code = f"""
from pathlib import Path
from revdist.devices.ledger import Ledger
Ledger(Path({str(device.path)!r})).claim_slot('trainer')
print(input('claimed'))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.read(7) == b"claimed"
        with pytest.raises(UsageError, match=r"48.0 MiB, not 96.0 MiB.*trainer"):
            Ledger.create(ledger_path("cpu-0"), 96 * MIB)
        with pytest.raises(DeviceError, match="in use"):
            device.remove()
        other.communicate(b"end\n")
    assert Ledger.create(ledger_path("cpu-0"), 96 * MIB).capacity_bytes == 96 * MIB
    device.remove()


def test_a_missing_device_names_those_there_are(devices_folder: Path) -> None:
    Ledger.create(ledger_path("cpu-0"), MIB)
    with pytest.raises(DeviceNotFound, match="cpu-0"):
        Ledger(ledger_path("cpu-7"))


@pytest.mark.parametrize("name", ["", "../cpu", "a/b", ".hidden", "x" * 61])
def test_a_bad_name_is_refused(devices_folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a device"):
        ledger_path(name)


@pytest.mark.parametrize("capacity_bytes", [0, -1])
def test_a_capacity_is_positive(devices_folder: Path, capacity_bytes: int) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        Ledger.create(ledger_path("cpu-0"), capacity_bytes)


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(100_000)])
def test_a_foreign_file_is_refused(devices_folder: Path, content: bytes) -> None:
    path = ledger_path("cpu-0")
    path.write_bytes(content)
    with pytest.raises(DeviceError, match="remove the file"):
        Ledger(path)


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVDIST_DEVICES_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(DeviceError, match="another user"):
        ledger.devices_folder()


def test_a_process_has_one_slot(devices_folder: Path) -> None:
    device = Ledger.create(ledger_path("cpu-0"), MIB)
    assert device.claim_slot("a") == device.claim_slot("b") == Ledger(device.path).claim_slot("c")


def _claim(path: Path) -> int:
    return Ledger.create(path, MIB).claim_slot("racer")


def test_processes_that_create_and_claim_at_once_get_slots_of_their_own(devices_folder: Path) -> None:
    path = ledger_path("cpu-0")
    with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as processes:
        pids_and_slots = set(processes.map(_pid_and_claim, [path] * 16))
    assert len({pid for pid, _ in pids_and_slots}) == len({slot for _, slot in pids_and_slots}) == len(pids_and_slots)


def _pid_and_claim(path: Path) -> tuple[int, int]:
    return os.getpid(), _claim(path)


def test_slots_of_the_dead_are_free_once_nobody_lives(devices_folder: Path) -> None:
    path = ledger_path("cpu-0")
    Ledger.create(path, MIB)
    code = f"""
from pathlib import Path
from revdist.devices.ledger import Ledger
device = Ledger(Path({str(path)!r}))
device.charge_by_hand(device.claim_slot('gone'), {MIB})
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True)
        balance = Ledger(path).balance()
        assert (balance.used_bytes, balance.holders) == (0, ())
    assert Ledger(path).claim_slot("here") == 0


def test_a_newcomer_takes_the_place_of_the_dead_when_it_is_full(
    devices_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Ledger.create(ledger_path("cpu-0"), MIB)
    identities = iter(range(1, 1000))
    dead: set[int] = set()
    monkeypatch.setattr(host, "process_identity", lambda pid: next(identities))
    monkeypatch.setattr(Ledger, "_is_alive", lambda self, slot: slot.owner not in dead)
    assert [device.claim_slot("early") for _ in range(ledger.NUM_SLOTS)] == list(range(ledger.NUM_SLOTS))
    with pytest.raises(DeviceError, match="all 128 slots"):
        device.claim_slot("one too many")
    dead.add(8)
    assert device.claim_slot("newcomer") == 7


def test_a_zombie_holds_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert host.process_identity(os.getpid())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has collected it
    assert host.process_identity(child.pid) == 0
    child.wait()


def test_a_process_of_another_pid_namespace_is_taken_to_live(
    devices_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Ledger.create(ledger_path("cpu-0"), 2 * MIB)
    monkeypatch.setattr(host, "process_identity", lambda pid: 1 << 40 | 4_194_000)
    monkeypatch.setattr(host, "pid_namespace", lambda: 1)
    device.charge_by_hand(device.claim_slot("elsewhere"), MIB)
    monkeypatch.undo()
    assert device.balance().used_bytes == MIB

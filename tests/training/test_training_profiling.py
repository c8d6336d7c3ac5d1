"""What a replica's profile is measured with."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from replicas import run_config

from revdist.devices import open_device
from revdist.planning.costs import Profile
from revdist.training.parts import build_parts
from revdist.training.profiling import Profiling

pytestmark = pytest.mark.usefixtures("devices_folder")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def profile() -> Profile:
    config = run_config()
    device = open_device(kind="cpu", name="cpu-0", capacity_bytes=64 * 2**20)
    device.activate("test")
    try:
        parts = build_parts(config, device.torch_device)
        (found,) = Profiling(config, parts.model, parts.loss_fn, parts.train, device).profiles((4,), lambda *_: None)
        return found
    finally:
        device.deactivate()


def test_one_thread_is_timed_by_its_own_clock(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On that clock another process that wants the same core takes nothing."""
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    assert (profile().base_s == 0) == (threads == 1)

"""What several tests of the chain take."""

from __future__ import annotations

import pytest
from reversible_models import INVERT

from revdist.planning.costs import Mode


@pytest.fixture(params=["SAVE", "INVERT"])
def modes(request: pytest.FixtureRequest) -> tuple[Mode, ...]:
    """The modes that `uniform` prefers: keep everything, or as little as possible."""
    return (Mode.SAVE,) if request.param == "SAVE" else INVERT


@pytest.fixture
def activated(ledger_device):
    """Makes and activates a CPU device of a given capacity."""

    def make(capacity_bytes, name="cpu-0"):
        device = ledger_device(capacity_bytes, name=name)
        device.activate()
        if not device.enforced:
            pytest.skip("no C++ compiler: the CPU device enforces nothing")
        return device

    return make

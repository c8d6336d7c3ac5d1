"""What several tests of the chain take."""

from __future__ import annotations

import pytest
from reversible_models import INVERT

from revdist.planning.costs import Mode


@pytest.fixture(params=["SAVE", "INVERT"])
def modes(request: pytest.FixtureRequest) -> tuple[Mode, ...]:
    """The modes that `uniform` prefers: keep everything, or as little as possible."""
    return (Mode.SAVE,) if request.param == "SAVE" else INVERT

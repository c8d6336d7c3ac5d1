"""Compile once, and no deadlines: tests judge plans, not the machine they run on."""

from __future__ import annotations

import hypothesis
import pytest

from revdist.planning.frontier import warm_up

hypothesis.settings.register_profile("planning", deadline=None)
hypothesis.settings.load_profile("planning")


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels() -> None:
    warm_up()

"""Compile once, so that no test's deadline pays for it."""

from __future__ import annotations

import pytest

from revdist.planning.frontier import warm_up


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels() -> None:
    warm_up()

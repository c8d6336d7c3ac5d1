"""The cluster and the runs of tests/cluster."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("training", "cluster"):
    sys.path.append(str(Path(__file__).parent.parent / folder))

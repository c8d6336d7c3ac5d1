"""Models whose factories print in every way there is."""

from __future__ import annotations

import logging
import os
import warnings

import small_models
from torch import nn


def classifier() -> nn.Module:
    rank, size, local = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    print(f"built by rank {rank} of {size}, local rank {local}")
    warnings.warn("a warning of user code", stacklevel=1)
    logging.getLogger("user").warning("a logged line")
    os.write(2, b"raw bytes\n")
    return small_models.classifier()

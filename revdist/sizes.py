"""Sizes in bytes as people write them."""

from __future__ import annotations

import math
import re

from revdist.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


def parse_bytes(value: int | str) -> int:
    """Bytes from `48MiB`, `1.5 GiB`, `200MB` or an integer.

    Raises ConfigError for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{value!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size == math.inf:
        raise ConfigError(f"{str(value)[:20]}... is not a size: it is larger than any number of bytes")
    return int(size)

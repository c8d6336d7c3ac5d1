"""Profiles kept between runs: what was measured once on a kind of device is not measured again.

One JSON file per key in the user's cache folder. The key covers what a profile depends on; a file that
cannot be read is as good as none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revdist.devices.build import cache_folder
from revdist.errors import DeviceError, InvalidCosts
from revdist.planning.costs import Option, Profile

_KEY = re.compile(r"[0-9a-f]{32}")


def profile_key(
    model: nn.Module, *, batch: Any, micro_batch: int, device_type: str, settings: Mapping[str, Any]
) -> str:
    """What a profile holds for, hashed: the model's modules and shapes, the batch, the device type, and versions."""
    facts = {
        "revdist": importlib.metadata.version("revdist"),
        "measured": [field.name for field in dataclasses.fields(Option)],
        "torch": torch.__version__,
        "device": device_type,
        "micro_batch": micro_batch,
        "model": repr(model),
        "parameters": [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()],
        "batch": [(tuple(part.shape[1:]), str(part.dtype)) for part in batch],
        **settings,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load_profile(key: str) -> Profile | None:
    """The profile kept under a key; None where there is none that can be read."""
    try:
        return Profile.from_json((cache_folder() / f"profile-{key}.json").read_text(encoding="utf-8"))
    except (DeviceError, OSError, UnicodeDecodeError, InvalidCosts):
        return None


def store_profile(profile: Profile) -> None:
    """Keep a profile under its key, in one piece. A cache that cannot be written is not an error.

    A key that `profile_key` did not make is not kept: it names the file, and may come from elsewhere.
    """
    if not _KEY.fullmatch(profile.key):
        return
    try:
        folder = cache_folder()
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
            file.write(profile.to_json())
        os.replace(file.name, folder / f"profile-{profile.key}.json")
    except (DeviceError, OSError):
        return


def cpu_type() -> str:
    """The model of this machine's processor, as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

"""Profiles of a small made-up RevNet: down-sampling layers between reversible blocks."""

from __future__ import annotations

from revdist.planning.costs import Mode, Option, Profile

KIB = 2**10


def profile(micro_batch: int = 32, *, operators: int = 12) -> Profile:
    options = []
    names = []
    for index in range(operators):
        stage = 3 * index // operators
        size = micro_batch * (96 >> stage) * KIB + index * 16
        seconds = 1e-4 * micro_batch * (1 + 0.01 * index) + 5e-4
        if index % 4 == 0:
            options.append([Option(Mode.SAVE, size, size, 0.0), Option(Mode.RECOMPUTE, size // 3, 2 * size, seconds)])
            names.append(f"down{stage}")
        else:
            options.append([Option(Mode.SAVE, size, size // 2, 0.0), Option(Mode.INVERT, 0, 2 * size, seconds)])
            names.append(f"block{stage}.{index % 4}")
    return Profile.from_options(
        options,
        operator_names=tuple(names),
        micro_batch=micro_batch,
        base_s=3e-3 * micro_batch + 0.02,
        outside_bytes=micro_batch * 8 * KIB,
        fixed_bytes=2048 * KIB,
    )

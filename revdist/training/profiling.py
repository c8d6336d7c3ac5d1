"""The profiles of this replica's device: from the cache where there are any, else measured now."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from revdist.config import RunConfig
from revdist.devices.device import Device
from revdist.planning.costs import Mode, Profile
from revdist.reversible.profiler import profile_chain
from revdist.training.data import fetch
from revdist.training.pooling import aligned, pooled
from revdist.training.profile_cache import cpu_type, load_profile, profile_key, store_profile
from revdist.training.replicated import SummedLoss, move_batch

Progress = Callable[[int, int], None]
"""Called with the measurements done so far and their total."""

_LOSS_BYTES = 8
"""The summed loss of a micro-batch, kept until the backward of its scaled copy has ended."""


@final
class Profiling:
    """Gets the profiles of a model on a device at the micro-batch sizes that planning needs."""

    def __init__(
        self, config: RunConfig, model: nn.Module, loss_fn: Callable[..., Tensor], dataset: Any, device: Device
    ):
        self._config = config
        self._summed = SummedLoss(model, loss_fn, config.precision)
        self._dataset = dataset
        self._device = device
        self._read: dict[str, Profile] = {}
        self.num_cached = 0
        """Profiles that came from the cache."""
        self.known: tuple[Profile, ...] = ()
        """After `pool`: one profile for every key that some rank has."""

    def profiles(self, sizes: tuple[int, ...], progress: Progress) -> tuple[Profile, ...]:
        """Profiles at these micro-batch sizes, smallest first; raises as `one_by_one` does."""
        return tuple(reversed([profile for profile, _ in self.one_by_one(sizes, progress)]))

    def one_by_one(self, sizes: tuple[int, ...], progress: Progress) -> Iterator[tuple[Profile, bool]]:
        """Profiles at these micro-batch sizes, largest first, each measured when it is asked for.

        Beside each stands whether it is the last.

        Where the device has no room for a size, half of it is measured instead, and smaller ones that no longer are
        shrink in proportion: a line through neighbouring sizes would show nothing but noise. Raises
        torch.OutOfMemoryError where not even one sample fits.
        """
        limit, shrunk = max(sizes), Fraction(1)
        for number, size in enumerate(sorted(sizes, reverse=True), start=1):
            wanted = size if size <= limit else min(limit, max(1, int(size * shrunk)))
            profile = self._get_or_halve(wanted, _part_of(progress, number - 1, len(sizes)))
            limit, shrunk = profile.micro_batch - 1, Fraction(profile.micro_batch, size)
            is_last = number == len(sizes) or limit == 0
            yield profile, is_last
            if is_last:
                return

    def cached(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those micro-batch sizes at which this type of device has been profiled."""
        if not self._config.planning.profile_cache:
            return ()
        sample = self._batch(1)
        return tuple(size for size in sizes if self._load(self._key(sample, size)) is not None)

    def pool(self, own: Sequence[Profile]) -> tuple[Profile, ...]:
        """Own profiles, pooled with those of all ranks on devices of the same type; every rank calls this.

        What was measured now is kept in the cache.
        """
        everyone: list[list[Profile]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, list(own))
        measured = [profile for profiles in everyone for profile in profiles]
        self.known = pooled(list({profile.key: profile for profile in measured}.values()), measured)
        pool = pooled(own, measured)
        if self._config.planning.profile_cache and self.num_cached < len(own):
            for profile in pool:
                store_profile(profile)
        return aligned(pool)

    def _get_or_halve(self, micro_batch: int, progress: Progress) -> Profile:
        while True:
            try:
                return self._get(micro_batch, progress)
            except torch.OutOfMemoryError:
                if micro_batch == 1 or self._config.micro_batch is not None:
                    raise
            micro_batch //= 2

    def _get(self, micro_batch: int, progress: Progress) -> Profile:
        batch = self._batch(micro_batch)
        key = self._key(batch, micro_batch)
        cached = self._load(key)
        if cached is not None:
            self.num_cached += 1
            return dataclasses.replace(cached, device=self._device.uuid)
        measured = self._measure(batch, micro_batch, progress)
        return dataclasses.replace(measured, micro_batch=micro_batch, device=self._device.uuid, key=key)

    def _load(self, key: str) -> Profile | None:
        """The profile in the cache, read once; none where the configuration does without."""
        if self._config.planning.profile_cache and key not in self._read and (found := load_profile(key)) is not None:
            self._read[key] = found
        return self._read.get(key)

    def _measure(self, batch: tuple[Any, Any], micro_batch: int, progress: Progress) -> Profile:
        inputs, target = batch
        with self._summed.autocast(inputs):
            measured = profile_chain(
                self._summed.model,
                inputs,
                lambda output: self._summed.loss_fn(output, target, reduction="sum") / micro_batch,
                meter=self._device.meter(),
                repeats=self._config.planning.profile_repeats,
                modes=[Mode(mode) for mode in self._config.planning.modes],
                progress=progress,
                host_clock=_host_clock(),
            )
        outside_bytes = measured.outside_bytes + _storage_bytes(target) + _LOSS_BYTES
        return dataclasses.replace(measured, outside_bytes=outside_bytes)

    def _batch(self, micro_batch: int) -> tuple[Any, Any]:
        indices = np.arange(micro_batch) % len(self._dataset)
        return move_batch(fetch(self._dataset, indices), self._device.torch_device, self._config.precision)

    def _key(self, batch: tuple[Any, Any], micro_batch: int) -> str:
        return profile_key(
            self._summed.model,
            batch=batch,
            micro_batch=micro_batch,
            device_type=cpu_type() if self._device.kind == "cpu" else self._device.name,
            settings={
                "loss": self._config.loss,
                "precision": self._config.precision,
                "threads": self._config.threads_per_worker,
                "clock": _host_clock().__name__,
                "modes": self._config.planning.modes,
            },
        )


def sizes_to_profile(config: RunConfig, world_size: int) -> tuple[int, ...]:
    """Micro-batch sizes to measure: the one that is configured, or two around what an equal share would need.

    Costs between two measured sizes lie on the line through them.
    """
    if config.micro_batch is not None:
        return (config.micro_batch,)
    if config.planning.micro_batches:
        return tuple(sorted(set(config.planning.micro_batches)))
    equal_share = -(-config.global_batch // world_size)
    return tuple(sorted({max(1, equal_share // 4), equal_share}))


def _host_clock() -> Callable[[], float]:
    """What the host's own work is timed with: its one thread's clock, which leaves out what other processes take.

    Those take it in slices: short work would come out as if it had a core to itself, and long work as if it had half
    of one. A device that shares its core for good shows in its steps, and a profile is kept for later runs.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _storage_bytes(value: Any) -> int:
    """Bytes of a batch's tensors, however it nests them."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_storage_bytes(part) for part in parts)


def _part_of(progress: Progress, number: int, count: int) -> Progress:
    """Progress of one of several equally long measurements."""
    return lambda done, total: progress(number * total + done, count * total)

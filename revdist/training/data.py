"""The order of the data: which samples belong to a step, and who processes which of them.

Sample t of a run is fixed by (seed, epoch, step) alone. Shares only cut the global batch of a step
into consecutive slices, one per rank, so whatever happens to shares, ranks and processes, an epoch
uses every sample exactly once. The last batch of an epoch may be smaller than the others; shares
are scaled down to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, default_collate

from revdist.errors import ConfigError
from revdist.planning.batch import micro_batch_sizes

Indices = npt.NDArray[np.int64]

_FROM_STREAM = "read it into memory or files first, `list(stream)` say, or go through Ray Data"
_REMEDIES = {"ray": "wrap it, revdist.cluster.ray_data.as_map_style(dataset, input=..., target=...)"}
"""By the package of a dataset that has no indices: what to do about it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The order in which a run uses `num_samples` samples."""

    num_samples: int
    global_batch: int
    """Samples per step over all ranks."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def epoch(self, step: int) -> int:
        """The epoch that a step of the run belongs to, from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Indices:
        """Indices of the samples of a step, in order; int64 (global_batch,) or fewer at an epoch's end."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch
        return self._permutation(epoch)[start : start + self.global_batch]

    def samples_before(self, step: int) -> int:
        """Samples that the steps before this one process."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * self.num_samples + position * self.global_batch

    def num_steps(self, *, epochs: int | None, steps: int | None) -> int:
        """Length of a run given in epochs or in steps."""
        return steps if steps is not None else (epochs or 0) * self.steps_per_epoch

    def _permutation(self, epoch: int) -> Indices:
        """All indices in the order of an epoch; computed once per epoch, since a run walks through them in order."""
        cached: tuple[int, Indices] | None = self.__dict__.get("_cached")
        if cached is None or cached[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            cached = (epoch, rng.permutation(self.num_samples))
            object.__setattr__(self, "_cached", cached)
        return cached[1]


def slice_of(shares: Sequence[int], rank: int, num_samples: int) -> slice:
    """The part of a batch of `num_samples` that a rank processes.

    Slices are consecutive in rank order and cover the batch. A batch that is smaller than the sum of
    the shares is cut in the same proportions, which may leave a rank without a sample.
    """
    total = sum(shares)
    start = sum(shares[:rank])
    return slice(num_samples * start // total, num_samples * (start + shares[rank]) // total)


def micro_batches(indices: Indices, micro_batch: int) -> list[Indices]:
    """Cut a rank's samples into consecutive micro-batches of at most that size, which differ by one at most."""
    if not len(indices):
        return []
    sizes = micro_batch_sizes(len(indices), -(-len(indices) // micro_batch))
    return np.split(indices, np.cumsum(sizes)[:-1])


def fetch(dataset: Any, indices: Indices) -> Any:
    """Load samples and stack them into a batch: whatever the dataset's samples are, each part stacked."""
    chosen = indices.tolist()
    if hasattr(dataset, "__getitems__"):
        return default_collate(dataset.__getitems__(chosen))
    return default_collate([dataset[index] for index in chosen])


def consecutive(dataset: Any, micro_batch: int, part: slice) -> Iterator[Any]:
    """The samples of a slice of the dataset, in order, in batches of at most `micro_batch`."""
    for chosen in micro_batches(np.arange(len(dataset))[part], micro_batch):
        yield fetch(dataset, chosen)


def given_to_trainer() -> Any:
    """Stands in a configuration for data that had no factory."""
    raise ConfigError(
        "this run's data were given to revdist.Trainer as `datasets`: give them again, or name a factory in `data`"
    )


def check_map_style(dataset: Any, name: str) -> None:
    """Raise ConfigError unless the dataset has a length, takes an index and holds at least one sample.

    The order of the data is made of indices: only so does every sample count once per epoch whatever happens to
    shares, replicas and processes.
    """
    remedy = _REMEDIES.get(type(dataset).__module__.partition(".")[0], "give a map-style dataset")
    if isinstance(dataset, IterableDataset):
        remedy = "a stream cannot be asked for the samples of a step again; " + _FROM_STREAM
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and _has_length(dataset)):
        raise ConfigError(f"the {name} data are a {type(dataset).__name__}, without __len__ and __getitem__: {remedy}")
    if len(dataset) == 0:
        raise ConfigError(f"the {name} data hold no sample")


def _has_length(dataset: Any) -> bool:
    try:
        len(dataset)
    except (TypeError, AttributeError, NotImplementedError):
        return False
    return True

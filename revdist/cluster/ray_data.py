"""Ray Data as input: a Ray Dataset, read once into Ray's object store, whose rows are found by number.

    train = ray.data.read_parquet("s3://bucket/train").map_batches(prepare)
    revdist.Trainer(config, datasets=(as_map_style(train, input="image", target="label"), None)).fit()

A run's data order is made of indices, so that every sample counts once per epoch whatever happens to
replicas; a stream cannot give that. The rows are therefore read to the end once, in a fixed order, and
stay as blocks in the object store, which spills to disk what it has no room for. Every host gets the
blocks it asks for, and with a shuffled order that is all of them. The blocks belong to the process that
called `as_map_style`: it must live as long as the run.

Preparation that is the same in every epoch belongs into Ray Data, where it runs in parallel; what is
drawn anew in every step belongs into the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from revdist.errors import ConfigError, DataMissing

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sample = tuple[torch.Tensor, torch.Tensor]


def as_map_style(dataset: Any, *, input: str, target: str) -> RayRows:
    """Read a `ray.data.Dataset` into the object store; its samples are `(input, target)` by number.

    input, target: columns of numbers or of arrays of one shape, given out as tensors of the same type

    Needs a Ray that this process is connected to. Raises ConfigError for a column that is not there or
    holds something else than numbers, DataMissing where the dataset cannot be read.
    """
    import ray

    dataset.context.execution_options.preserve_order = True  # the same sample at an index, in this run and when resumed
    try:
        columns = dataset.schema().names
        for column in (input, target):
            if column not in columns:
                raise ConfigError(f"the Ray Dataset has no column {column!r}: it has {', '.join(columns)}")
        blocks = dataset.select_columns([input, target]).materialize().to_arrow_refs()
    except ray.exceptions.RayError as error:
        raise DataMissing(f"the Ray Dataset cannot be read: {_cause(error)}") from error
    count = ray.remote(num_cpus=0)(_num_rows)
    rows = RayRows(blocks, ray.get([count.remote(block) for block in blocks]), input, target)
    if len(rows):
        rows.check()
    return rows


@final
class RayRows(torch.utils.data.Dataset[Sample]):
    """Rows of blocks in Ray's object store, by number. Pickles as references: Ray sends no data with it."""

    def __init__(self, blocks: Sequence[Any], num_rows: Sequence[int], input: str, target: str) -> None:
        """blocks: references of Arrow tables; num_rows: of each."""
        self._blocks = list(blocks)
        self._starts = np.cumsum([0, *num_rows])
        self._columns = (input, target)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples at once: every block that holds one of them is looked at once."""
        import ray

        rows = np.asarray(indices, dtype=np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        wanted = np.unique(owners)
        samples: list[Any] = [None] * len(rows)
        for number, block in zip(wanted, ray.get([self._blocks[number] for number in wanted]), strict=True):
            positions = np.flatnonzero(owners == number)
            found = self._take(block, rows[positions] - self._starts[number])
            for position, sample in zip(positions, found, strict=True):
                samples[position] = sample
        return samples

    def check(self) -> None:
        """Raise ConfigError unless the first row holds numbers."""
        try:
            self[0]
        except (TypeError, ValueError) as error:
            first, second = self._columns
            raise ConfigError(
                f"columns {first!r} and {second!r} must hold numbers or arrays of one shape: {error}"
            ) from None

    def _take(self, table: Any, rows: NDArray[np.int64]) -> list[Sample]:
        from ray.data.block import BlockAccessor

        taken = BlockAccessor.for_block(table).take(rows.tolist())
        arrays = BlockAccessor.for_block(taken).to_numpy(list(self._columns))
        # Copies: the object store is shared and must not be written to.
        inputs, targets = (torch.from_numpy(np.array(arrays[column])) for column in self._columns)
        return list(zip(inputs, targets, strict=True))


def _cause(error: Exception) -> str:
    """The line that names what went wrong, in Ray's account of a task that failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception): ", line)]
    return (named or lines[-1:] or [type(error).__name__])[0]


def _num_rows(block: Any) -> int:
    return int(block.num_rows)

"""How far rebuilt activations are from the originals, operator by operator."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from revdist.planning.costs import Mode
from revdist.reversible.boundary import Exit, converted
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.conditions import Ambience
from revdist.reversible.operator import Streams
from revdist.reversible.record import Record


def reconstruction_errors(chain: ReversibleChain, inputs: Streams) -> tuple[float, ...]:
    """Per operator, the relative L2 error of its rebuilt input when all after it in its run are rebuilt too.

    A run of invertible operators ends at one that is not, which has error 0: rebuilding starts afresh from
    its input. Takes the memory of one operator at a time; the originals wait in host memory.
    """
    records: list[Record] = []
    originals: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        streams, ambience = inputs, Ambience(inputs[0].device)
        for operator in chain.operators:
            streams = converted(streams, operator.num_streams, chain.split_dim)
            originals.append(tuple(_to_host(stream) for stream in streams))
            record = Record(
                operator, Mode.INVERT, streams, ambience, before=None, split_dim=chain.split_dim, shortage=chain.demote
            )
            streams = record.run(streams)
            ambience = ambience.now()
            record.end_forward(streams, ambience)
            record.close(Exit(()))
            records.append(record)
        errors = [0.0] * len(records)
        for index in reversed(range(len(records))):
            if Mode.INVERT in records[index].operator.modes:
                streams = records[index].invert(streams)
                errors[index] = _relative_error(streams, originals[index])
            else:
                streams = tuple(original.to(inputs[0].device) for original in originals[index])
    return tuple(errors)


def _to_host(stream: Tensor) -> Tensor:
    """A copy in memory that no device's allocator counts."""
    copy = np.empty(stream.numel() * stream.element_size(), dtype=np.uint8)
    host = torch.from_numpy(copy).view(stream.dtype).view(stream.shape)
    return host.copy_(stream)


def _relative_error(rebuilt: Streams, originals: Streams) -> float:
    pairs = zip(rebuilt, originals, strict=True)
    difference = sum(float((one.cpu().double() - other.double()).square().sum()) for one, other in pairs)
    norm = sum(float(original.double().square().sum()) for original in originals)
    return float((difference / norm) ** 0.5) if norm else 0.0

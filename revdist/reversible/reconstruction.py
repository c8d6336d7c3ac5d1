"""How far rebuilt activations are from the originals, operator by operator."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from revdist.planning.costs import Mode
from revdist.reversible.boundary import Exit, entering
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.conditions import Ambience
from revdist.reversible.operator import Streams
from revdist.reversible.record import Record


@dataclasses.dataclass(frozen=True, slots=True)
class Reconstruction:
    """How well one operator inverts; both 0 and 1 where it does not."""

    error: float
    """Relative L2 error of its rebuilt input, rebuilt from its exact output."""
    growth: float
    """By how much an error of its output grows in its rebuilt input, at least 1."""


def reconstructions(chain: ReversibleChain, inputs: Streams) -> tuple[Reconstruction, ...]:
    """Per operator, how well it inverts these inputs of the chain.

    Each is inverted twice: from its exact output, and from the one that the inverses of all after it in
    its run have left. Takes the memory of one operator at a time; the originals wait in host memory.
    """
    records, originals = _run_forward(chain, inputs)
    found = [Reconstruction(0.0, 1.0)] * len(records)
    device = inputs[0].device
    rebuilt, before = originals[-1], 0.0
    with torch.no_grad():
        for index in reversed(range(len(records))):
            record, original, output = records[index], originals[index], originals[index + 1]
            if Mode.INVERT not in record.operator.modes:
                rebuilt, before = original, 0.0
                continue
            own = _relative_error(record.invert(_on(output, device)), original)
            rebuilt = record.invert(_on(rebuilt, device))
            accumulated = _relative_error(rebuilt, original)
            found[index] = Reconstruction(own, _growth(own, accumulated, before))
            before = accumulated
    return tuple(found)


def _run_forward(chain: ReversibleChain, inputs: Streams) -> tuple[list[Record], list[Streams]]:
    """The records of a forward and, in host memory, the inputs of each and the outputs of the last."""
    records: list[Record] = []
    originals: list[Streams] = []
    with torch.no_grad():
        streams, before, ambience = inputs, None, Ambience(inputs[0].device)
        for operator in chain.operators:
            streams = entering(streams, operator, before, chain.split_dim)
            originals.append(tuple(_to_host(stream) for stream in streams))
            record = Record(
                operator, Mode.INVERT, streams, ambience, before=None, split_dim=chain.split_dim, shortage=chain.demote
            )
            streams = record.run(streams, None)
            ambience = record.end_forward(streams, ambience)
            record.close(Exit(()))
            records.append(record)
            before = operator
        originals.append(tuple(_to_host(stream) for stream in streams))
    return records, originals


def _growth(own: float, accumulated: float, before: float) -> float:
    """What is left of the accumulated error without the operator's own, if the two are independent, over that before.

    Where they are not but add up, this is a little too large.
    """
    inherited = max(0.0, accumulated**2 - own**2) ** 0.5
    return max(1.0, inherited / before) if before else 1.0


def _on(streams: Streams, device: torch.device) -> Streams:
    return tuple(stream.to(device) for stream in streams)


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

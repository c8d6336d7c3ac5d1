"""The state of the random number generators that code outside of steps may draw from.

A step seeds torch's generators itself, from the run's seed, its own number and the rank, so nothing in
it depends on what was drawn before. What else draws, a learning-rate rule of one's own say, goes on
where it stopped.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch

from revdist.errors import CheckpointError


def generator_states() -> dict[str, Any]:
    """The state of torch's generators, NumPy's global one and Python's, as of now, in what JSON can hold."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "cuda": [bytes(state.numpy()).hex() for state in torch.cuda.get_rng_state_all()],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_generators(text: str) -> None:
    """Put the generators into a state that `generator_states` gave, as JSON; GPUs that were not there keep theirs.

    Raises CheckpointError for anything else.
    """
    try:
        saved = json.loads(text)
        version, internal, gauss_next = saved["python"]
        random.setstate((version, tuple(internal), gauss_next))
        kind, keys, position, has_gauss, gauss = saved["numpy"]
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(_tensor(saved["torch"]))
        for index, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_tensor(state), index)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"not the state of random number generators: {error}") from None


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)

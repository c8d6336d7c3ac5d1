"""Every configuration that ships names a model, data and a loss that go together, and learns from the first batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from revdist.config import RunConfig
from revdist.errors import DataMissing
from revdist.planning.costs import Mode
from revdist.reversible import find_chain
from revdist.training.data import fetch
from revdist.training.factories import call_factory, import_factory

CONFIGS = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if "revnet104" in path.stem else ())
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
]


@pytest.mark.parametrize("path", CONFIGS)
def test_a_configuration_trains(path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = RunConfig.from_yaml(path)
    try:
        train, _ = call_factory(config.data.factory, config.data.kwargs)
    except DataMissing as missing:
        pytest.skip(str(missing))
    model = call_factory(config.model.factory, config.model.kwargs)
    loss_fn = import_factory(config.loss)
    chain = find_chain(model)
    chain.set_schedule([Mode.INVERT if Mode.INVERT in modes else Mode.SAVE for modes in chain.options()])
    batch, target = fetch(train, np.arange(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        torch.manual_seed(1)  # the same dropout, noise and hashes, so that losses compare
        loss = loss_fn(model(batch), target, reduction="sum") / len(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

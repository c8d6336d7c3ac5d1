"""What a run is made of, built from its configuration on this replica's device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revdist.config import RunConfig
from revdist.errors import ConfigError, FactoryError
from revdist.reversible.chain import ReversibleChain, find_chain
from revdist.training.data import DataOrder, check_map_style
from revdist.training.factories import call_factory, import_factory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The model, on its device, and the data."""

    model: nn.Module
    chain: ReversibleChain
    """The part of the model that is planned."""
    loss_fn: Callable[..., Tensor]
    train: Any
    test: Any
    """None: nothing to score at the end."""
    order: DataOrder
    num_steps: int
    """Length of the run."""

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def build_parts(config: RunConfig, device: torch.device, data: tuple[Any, Any] | None = None) -> Parts:
    """Call the factories of a run. Every rank builds the same model, from the same seed.

    data: the training and test data, in place of the factory's

    Raises FactoryError, DataMissing or ConfigError for what cannot be trained.
    """
    train, test = _build_data(config) if data is None else data
    _check_data(config, train, test)
    model, chain = _build_model(config, device)
    order = DataOrder(num_samples=len(train), global_batch=config.global_batch, seed=config.seed)
    return Parts(
        model=model,
        chain=chain,
        loss_fn=import_factory(config.loss),
        train=train,
        test=test,
        order=order,
        num_steps=order.num_steps(epochs=config.epochs, steps=config.steps),
    )


def _build_data(config: RunConfig) -> tuple[Any, Any]:
    data = call_factory(config.data.factory, config.data.kwargs)
    try:
        train, test = data
        return train, test
    except (TypeError, ValueError):
        raise FactoryError(
            f"{config.data.factory} gave a {type(data).__name__}: it must give (train, test), two datasets; "
            "test may be None"
        ) from None


def _check_data(config: RunConfig, train: Any, test: Any) -> None:
    check_map_style(train, "training")
    if test is not None:
        check_map_style(test, "test")
    if config.global_batch > len(train):
        raise ConfigError(
            f"global_batch {config.global_batch} is more than the {len(train)} training samples: lower global_batch"
        )


def _build_model(config: RunConfig, device: torch.device) -> tuple[nn.Module, ReversibleChain]:
    torch.manual_seed(config.seed)
    model = call_factory(config.model.factory, config.model.kwargs)
    if not isinstance(model, nn.Module):
        raise FactoryError(f"{config.model.factory} gave a {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{config.model.factory} gave a model without a trainable parameter")
    chain = find_chain(model)
    dtype = torch.float64 if config.precision == "fp64" else None
    return model.to(device, dtype).train(), chain

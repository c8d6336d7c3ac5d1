"""The state of training as a flat mapping of names to tensors, to be saved or sent.

Hyperparameters are not part of it: they come from the configuration, the learning rate from the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revdist.errors import CheckpointError

_MODEL = "model/"
_OPTIMIZER = "optimizer/"

_PIECE_BYTES = 32 * 2**20

TensorSpec = tuple[str, torch.Size, torch.dtype]
T = TypeVar("T")


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state by name. The tensors are the live ones.

    Raises CheckpointError for an optimizer that keeps something else than tensors.
    """
    state = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r}: "
                    "only optimizers whose state is tensors can be saved"
                )
            state[f"{_OPTIMIZER}{names[parameter]}/{key}"] = value
    return state


def load_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put a state in place by copying, each of its tensors given up once it is copied: `state` is empty afterwards.

    Raises CheckpointError naming the first difference when the state is of another model.
    """
    own = model.state_dict()
    saved = {name.removeprefix(_MODEL): tensor for name, tensor in state.items() if name.startswith(_MODEL)}
    for name in sorted(own.keys() ^ saved.keys()):
        where = "the checkpoint" if name in saved else "the model"
        raise CheckpointError(f"the checkpoint is of another model: only {where} has {name!r}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint is of another model: {name!r} is {tuple(saved[name].shape)} there "
                f"and {tuple(tensor.shape)} here"
            )
    model.load_state_dict(saved)
    for name in saved:
        del state[_MODEL + name]
    saved.clear()
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    while state:
        full_name, tensor = state.popitem()
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition("/")
        parameter = parameters[name]
        # Counters stay where torch keeps them, on the CPU; moments live beside their parameter. A copy, since
        # what was read lies in memory that the device does not count.
        home = parameter.device if tensor.dim() else tensor.device
        optimizer.state[parameter][key] = tensor.to(home, copy=True)


def send_state(model: nn.Module, optimizer: torch.optim.Optimizer, word: T, *, source: int) -> T:
    """Give every rank the state of rank `source`, over the default process group; returns that rank's word.

    Tensors are sent many at once: what a message costs is the wait for the slowest rank, not its bytes.
    """
    sending = dist.get_rank() == source
    state = training_state(model, optimizer) if sending else {}
    # Larger elements first: each tensor then begins at a multiple of its element size.
    specs = sorted(((name, t.shape, t.dtype) for name, t in state.items()), key=lambda spec: -spec[2].itemsize)
    message: list[Any] = [word, specs]
    dist.broadcast_object_list(message, src=source)
    received: dict[str, Tensor] = {}
    for piece in _pieces(message[1]):
        sizes = [shape.numel() * dtype.itemsize for _, shape, dtype in piece]
        if sending:
            flat = torch.cat([_as_bytes(state[name]).to(_home(model)) for name, _, _ in piece])
        else:
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=_home(model))
        dist.broadcast(flat, src=source)
        if not sending:
            parts = zip(piece, torch.split(flat, sizes), strict=True)
            received |= {name: part.view(dtype).view(shape) for (name, shape, dtype), part in parts}
    if not sending:
        # Counters stay where torch keeps them, on the CPU.
        received = {name: tensor if tensor.dim() else tensor.cpu() for name, tensor in received.items()}
        load_training_state(model, optimizer, received)
    sent: T = message[0]
    return sent


def _pieces(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors that are sent together: as many as fit into a bound, which is what sending takes beside the state."""
    pieces: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        size = spec[1].numel() * spec[2].itemsize
        if not pieces or size > room:
            pieces.append([])
            room = _PIECE_BYTES
        pieces[-1].append(spec)
        room -= size
    return pieces


def digest(model: nn.Module) -> int:
    """A number that differs where parameters do, to the bit."""
    total = 0
    for position, parameter in enumerate(model.parameters()):
        total += (position + 1) * int(_bits(parameter.detach()).sum(dtype=torch.int64))
    return total % 2**62


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _bits(tensor: Tensor) -> Tensor:
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def _home(model: nn.Module) -> torch.device:
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device

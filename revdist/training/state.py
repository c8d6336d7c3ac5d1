"""The state of training as a flat mapping of names to tensors, to be saved or sent.

Hyperparameters are not part of it: they come from the configuration, the learning rate from the step. What an
optimizer counts in its parameter groups is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revdist.errors import CheckpointError
from revdist.training.host_tensors import host_tensor
from revdist.training.optimizer import count_in_group, counted_in_groups

_MODEL = "model/"
_OPTIMIZER = "optimizer/"
_GROUPS = "optimizer-groups/"

_PIECE_BYTES = 32 * 2**20

TensorSpec = tuple[str, torch.Size, torch.dtype]
T = TypeVar("T")


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state by name. The tensors are the live ones, but those of numbers.

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
    counted = counted_in_groups(optimizer)
    return state | {f"{_GROUPS}{index}/{key}": value for (index, key), value in counted.items()}


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
    counted = {name: state.pop(name) for name in list(state) if name.startswith(_GROUPS)}
    for name, tensor in counted.items():
        index, _, key = name.removeprefix(_GROUPS).partition("/")
        count_in_group(optimizer, int(index), key, tensor)
    parameters = dict(model.named_parameters())
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    while state:
        full_name, tensor = state.popitem()
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition("/")
        parameter = parameters[name]
        home, dtype = state_home(parameter, groups.get(parameter, {}), key, tensor.dtype)
        # A copy, since what was read lies in memory that the device does not count.
        optimizer.state[parameter][key] = tensor.to(home, dtype, copy=True)


def state_home(
    parameter: Tensor, group: Mapping[str, Any], key: str, dtype: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Where an optimizer's state of a parameter belongs, and as what type: as torch.optim.Optimizer decides it.

    group: of the parameter. key, dtype: of the state. Steps are counted on the CPU unless the update runs on the
    device as a whole; all else lies beside its parameter.
    """
    if key == "step":
        on_device = group.get("fused") or group.get("capturable")
        return parameter.device if on_device else torch.device("cpu"), dtype
    return parameter.device, parameter.dtype if dtype.is_floating_point and parameter.is_floating_point() else dtype


def send_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, word: T, *, source: int, is_missing: bool = True
) -> T:
    """Give ranks the state of rank `source`, over the default process group; returns that rank's word.

    is_missing: whether this rank lacks the state; one that has it takes part in the sending alone

    Tensors are sent many at once: what a message costs is the wait for the slowest rank, not its bytes. They are put
    in place once all have come, so that a rank whose source is lost meanwhile still has what it had; until then they
    lie in host memory that no device counts.
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
        if not sending and is_missing:
            for (name, shape, dtype), part in zip(piece, torch.split(flat, sizes), strict=True):
                received[name] = host_tensor(shape, dtype).copy_(part.view(dtype).view(shape))
    if not sending and is_missing:
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

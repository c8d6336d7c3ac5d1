"""Taking over reversible code written for other libraries, without importing any of them.

    element = adapt(module)      # one operator of a chain, from
                                 # - any module with `forward` and `inverse`
                                 # - memcnn: InvertibleModuleWrapper, AdditiveCoupling, AffineCoupling
                                 # - Hugging Face transformers: a ReformerLayer
    take_over(model)             # a whole model in place: its memcnn sequences and its Reformer encoders
                                 # become chains; parameters and the names in `state_dict` stay

What a module is, is told from what it has, so any version with these attributes works. What these
libraries do wrong (memcnn empties the storage of its input and counts BatchNorm up to three times, both
have backward passes that DDP with find_unused_parameters breaks) ends with the take-over, since their
backward is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast, final

from torch import Tensor, nn

from revdist.errors import UsageError
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.couplings import Coupling
from revdist.reversible.hugging_face import adapt_encoder, adapt_layer, is_encoder, is_layer
from revdist.reversible.operator import Operator, ReversibleOperator


def adapt(module: nn.Module, *, num_streams: int = 1) -> ReversibleOperator:
    """One element of a chain from a reversible module of another library, or of none.

    num_streams: for a class of one's own, whether it maps one tensor (1) or a pair (2)

    Parameters are shared. Raises UsageError for a module that is none of these.
    """
    if isinstance(module, ReversibleOperator):
        return module
    if _is_memcnn_wrapper(module):
        inner = cast(nn.Module, module._fn)
        adapted = adapt(inner, num_streams=num_streams)
        return _MemcnnWrapper(adapted) if isinstance(adapted, _MemcnnCoupling) else adapted
    if _is_memcnn_coupling(module):
        return _MemcnnCoupling(module)
    if is_layer(module):
        return adapt_layer(module)
    if callable(getattr(module, "inverse", None)):
        return _Pair(module) if num_streams == 2 else _Single(module)
    raise UsageError(
        f"{type(module).__name__} is not reversible: give it a method `inverse`, or put it into a chain as it is, "
        "where it can be saved or recomputed"
    )


def take_over(model: nn.Module) -> nn.Module:
    """Turn a model's memcnn sequences and Reformer encoders into chains, in place; returns the model.

    A `nn.Sequential` with memcnn modules in it becomes one chain, its other modules ordinary
    operators of it; a memcnn wrapper that stands alone becomes a chain of its own. Where the model
    itself is one of these, the chain is returned instead.

    Raises UsageError where nothing is found, or couplings of one sequence split different dimensions.
    """
    taken, found = _taken_over(model, {})
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no memcnn modules and no Reformer encoder: "
            "build a revdist.ReversibleChain of its layers, with adapt() for those that invert"
        )
    return taken


_Known = dict[nn.Module, tuple[nn.Module, bool]]


def _taken_over(module: nn.Module, known: _Known) -> tuple[nn.Module, bool]:
    """What takes the module's place, itself where it stays, and whether anything was found in it.

    known: what became of others, so that one with several names is taken over once and stays one
    """
    if module not in known:
        known[module] = _taken_over_first(module, known)
    return known[module]


def _taken_over_first(module: nn.Module, known: _Known) -> tuple[nn.Module, bool]:
    if is_encoder(module):
        return adapt_encoder(module), True
    children = {name: child for name, child in module._modules.items() if child is not None}
    couplings = [child for child in children.values() if _is_memcnn(child)]
    if isinstance(module, nn.Sequential) and couplings:
        adapted = {coupling: adapt(coupling) for coupling in couplings}
        return _chain({name: adapted.get(child, child) for name, child in children.items()}, couplings), True
    if _is_memcnn_wrapper(module):
        return _chain({"_fn": adapt(cast(nn.Module, module._fn))}, [module]), True
    found = False
    for name, child in children.items():
        taken, found_below = _taken_over(child, known)
        found = found or found_below
        if taken is not child:
            setattr(module, name, taken)
    return module, found


def _chain(elements: dict[str, nn.Module], couplings: list[nn.Module]) -> ReversibleChain:
    dims = {getattr(getattr(c, "_fn", c), "split_dim", 1) for c in couplings}
    if len(dims) > 1:
        raise UsageError(f"couplings of one sequence split dimensions {sorted(dims)}: a chain splits one")
    chain = ReversibleChain(elements, split_dim=dims.pop())
    chain.training = couplings[0].training  # its alone: what is in it keeps its own flags
    return chain


def _is_memcnn_wrapper(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_fn", None), nn.Module) and hasattr(module, "keep_input")


def _is_memcnn_coupling(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("Fm", "Gm", "split_dim", "inverse"))


def _is_memcnn(module: nn.Module) -> bool:
    return _is_memcnn_wrapper(module) or _is_memcnn_coupling(module)


@final
class _MemcnnCoupling(Coupling):
    """memcnn's coupling, with its names, on the halves that the chain makes."""

    branch_names: ClassVar[tuple[str, str]] = ("Fm", "Gm")

    def __init__(self, coupling: nn.Module) -> None:
        super().__init__(cast(nn.Module, coupling.Fm), cast(nn.Module, coupling.Gm))
        self._affine = any(parent.__name__ == "AffineCoupling" for parent in type(coupling).__mro__)
        self.training = coupling.training

    def combine(self, stream: Tensor, change: Any) -> Tensor:
        if not self._affine:
            return stream + cast(Tensor, change)
        scale, shift = cast(tuple[Tensor, Tensor], change)
        return stream * scale + shift

    def uncombine(self, stream: Tensor, change: Any) -> Tensor:
        if not self._affine:
            return stream - cast(Tensor, change)
        scale, shift = cast(tuple[Tensor, Tensor], change)
        return (stream - shift) / scale


@final
class _MemcnnWrapper(ReversibleOperator):
    """memcnn's InvertibleModuleWrapper: a name in front of the coupling's names, and nothing else."""

    num_streams: ClassVar[int] = 2

    def __init__(self, coupling: _MemcnnCoupling) -> None:
        super().__init__()
        self._fn = coupling
        self.training = coupling.training

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self._fn(x1, x2)  # type: ignore[no-any-return]

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        return self._fn.inverse(y1, y2)

    def operators(self, name: str) -> tuple[Operator, ...]:
        return self._fn.operators(f"{name}._fn")


class _Single(ReversibleOperator):
    """A module with `forward` and `inverse` of one tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)

    def inverse(self, *outputs: Tensor) -> Any:
        return cast(Callable[..., Any], self.module.inverse)(*outputs)


@final
class _Pair(_Single):
    """A module with `forward` and `inverse` of two tensors."""

    num_streams: ClassVar[int] = 2

"""One rank's part of one step: its micro-batches forward and backward, and what happens when memory runs out.

Out of memory is an event, met in three ways, the cheapest that works:
1. within the allocation that failed, cached activations of the step are released and rebuilt later
   (`ReversibleChain.demote`), and the allocation is tried again: nothing else notices;
2. while nothing has been reduced yet, this rank starts its part of the step again with a smaller plan;
3. once reduction has begun, this rank contributes zeros for what it cannot compute, so that no peer
   waits, and says in the step's agreement that all must redo it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from revdist.devices.device import Device
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.engine import nothing_left_pending
from revdist.training.data import Indices, fetch, micro_batches
from revdist.training.replicated import Replicated, move_batch

SmallerPlan = Callable[[str], int]
"""Called with torch's message when memory ran out: switches to a smaller plan and returns its micro-batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rank's part of a step came to."""

    samples: int
    loss_sum: float
    step_s: float
    """Time until all gradients were on their way, from the start of the first attempt."""
    compute_s: float
    """Time of the attempt that counts, from its start until the last own gradient was there."""
    retried_s: float
    """Time of attempts before it that ran out of memory."""
    demoted_bytes: int
    failed: bool
    """Gradients are not those of the whole part: the step must be redone."""


@final
class LocalStep:
    """Runs this rank's part of a step, as often as it takes."""

    def __init__(self, replicated: Replicated, chain: ReversibleChain, device: Device, *, precision: str, seed: int):
        self._replicated = replicated
        self._chain = chain
        self._device = device
        self._precision = precision
        self._seed = seed
        self._buffers = _Buffers(replicated.model)
        self._demoted_bytes = 0
        device.on_shortage(self._demote)

    def run(
        self,
        dataset: Any,
        indices: Indices,
        *,
        step: int,
        rank: int,
        scale: float,
        micro_batch: int,
        smaller_plan: SmallerPlan,
        on_their_way: Callable[[Outcome], None],
    ) -> None:
        """Gradients of the samples at `indices`, each sample's loss times `scale`, averaged over ranks.

        on_their_way: called once, when this rank has handed in all its gradients and those of others may not
            have come: nothing that it does may wait for them

        Raises what `smaller_plan` raises when there is none.
        """
        began_s = attempt_s = time.perf_counter()
        self._demoted_bytes = 0
        self._buffers.keep()
        failed = False

        def handed_in() -> None:
            on_their_way(
                Outcome(
                    samples=len(indices),
                    loss_sum=self._replicated.loss_sum,
                    step_s=time.perf_counter() - began_s,
                    compute_s=max(0.0, self._replicated.compute_ended_s - attempt_s),
                    retried_s=attempt_s - began_s,
                    demoted_bytes=self._demoted_bytes,
                    failed=failed,
                )
            )

        while True:
            attempt_s = time.perf_counter()
            self._draw_from(_step_seed(self._seed, step, rank))
            self._replicated.start_step(handed_in)
            shortage = self._attempt(dataset, micro_batches(indices, micro_batch), scale)
            if shortage is None:
                return
            micro_batch = smaller_plan(shortage)
            self._buffers.restore()
            if self._replicated.reduction_began:
                failed = True
                self._replicated.finish_reduction()
                return

    def restore_buffers(self) -> None:
        """Take back what the step did to buffers: it will be redone."""
        self._buffers.restore()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, memory that runs out is an error at once: there is no step whose activations could be given up."""
        self._device.on_shortage(None)
        try:
            yield
        finally:
            self._device.on_shortage(self._demote)

    def close(self) -> None:
        self._device.on_shortage(None)

    def _attempt(self, dataset: Any, parts: list[Indices], scale: float) -> str | None:
        """All micro-batches; returns what ran out of memory, if it did.

        That is the message, not the error: its traceback would keep the activations alive.
        """
        try:
            with nothing_left_pending():
                for part in parts[:-1]:
                    self._replicated.backward(self._load(dataset, part), scale, reduce=False)
                last = self._load(dataset, parts[-1]) if parts else None
                self._replicated.backward(last, scale, reduce=True)
        except torch.OutOfMemoryError as error:
            return str(error)
        return None

    def _draw_from(self, seed: int) -> None:
        """Seed what this device draws from: `torch.manual_seed` asks after every kind of device, 0.3 ms a step."""
        torch.default_generator.manual_seed(seed)
        if self._device.kind == "cuda":
            torch.cuda.manual_seed(seed)

    def _load(self, dataset: Any, part: Indices) -> tuple[Any, Any]:
        return move_batch(fetch(dataset, part), self._device.torch_device, self._precision)

    def _demote(self, missing_bytes: int) -> int:
        released = self._chain.demote(missing_bytes)
        self._demoted_bytes += released
        return released


@final
class _Buffers:
    """The model's buffers as they were before a step, so that a redone step updates them once."""

    def __init__(self, model: nn.Module) -> None:
        self._live: list[Tensor] = [buffer for buffer in model.buffers() if buffer.numel()]
        self._kept = [buffer.clone() for buffer in self._live]

    def keep(self) -> None:
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def restore(self) -> None:
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step, dropout's say, depend on these three alone: a redone or resumed step draws the same."""
    return (seed * 1_000_003 + step * 10_007 + rank) % 2**63

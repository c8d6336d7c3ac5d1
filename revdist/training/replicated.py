"""The model and its loss as every rank runs them: gradients of the whole batch, whatever the shares.

DistributedDataParallel averages gradients over ranks. Each rank therefore scales its summed loss by
world_size / batch, and the average is the gradient of the mean loss over the whole batch, exactly
the one that a single process computes, for any shares.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LossFn = Callable[..., Tensor]


def _nothing() -> None:
    """What is to be done where nobody asked for anything."""


@final
class SummedLoss(nn.Module):
    """Runs a model and sums its loss over a micro-batch, in the precision of the run."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, precision: str) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.precision = precision

    def forward(self, batch: tuple[Any, Any] | None) -> Tensor:
        """Summed loss () of a batch `(input, target)`; without a batch, a zero that depends on nothing."""
        if batch is None:
            return torch.zeros(())
        inputs, target = batch
        with self.autocast(inputs):
            return self.loss_fn(self.model(inputs), target, reduction="sum")

    def autocast(self, inputs: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(inputs.device.type, dtype=torch.bfloat16)


@final
class Replicated:
    """This rank's copy of the model among the others: computes, and reduces gradients as they arrive.

    Buffers, such as BatchNorm's statistics, are each rank's own between `average_buffers`: DDP's own
    broadcast runs once per forward, and ranks may differ in how many forwards make a step.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, precision: str, *, gradient_as_bucket_view: bool = True
    ) -> None:
        """gradient_as_bucket_view: gradients lie in the buckets that are reduced; else they take memory beside them."""
        self.loss = SummedLoss(model, loss_fn, precision)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.compute_ended_s = 0.0
        """Clock when the last own gradient of the reducing micro-batch was there; peers may still be computing."""
        self._reduced: set[int] = set()
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
        self._as_view = gradient_as_bucket_view
        self._ddp: DistributedDataParallel | None = None
        self._reducing = False
        self._expected = False
        """Whether DDP waits for gradients: it takes those of any backward from its reducing forward on."""
        self._losses: list[Tensor] = []
        self._on_their_way: Callable[[], None] = _nothing
        self.connect(alike=False)

    def connect(self, *, alike: bool) -> None:
        """Reduce gradients over the present process group from now on.

        alike: all ranks hold the same parameters already; else those of rank 0 are sent to them.
        """
        for parameter in self.parameters:  # DDP makes them views of its buckets; later ones would come on top of those
            parameter.grad = torch.zeros_like(parameter)
        self._ddp = DistributedDataParallel(
            self.loss,
            gradient_as_bucket_view=self._as_view,
            forward_sync_buffers=False,
            init_sync=not alike,
        )
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Reduce zeros once, so that DDP lays its buckets out now, in an order that depends on nothing.

        It lays them out anew in the order in which the first gradients come. Sums over three ranks and
        more round by where in a bucket a value lies: a group formed later must add up as one formed before.
        """
        assert self._ddp is not None
        self._ddp(None)
        for parameter in reversed(self.parameters):
            zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand_as(parameter)
            torch.autograd.backward(parameter, zeros)

    def disconnect(self) -> None:
        """Let go of the process group and of the buckets: a group that DDP still uses cannot be left."""
        if self._ddp is None:
            return
        self._ddp.reducer._remove_autograd_hooks()
        # The module lives on in reference cycles; what holds buckets and group must not.
        self._ddp.reducer = self._ddp.logger = None  # type: ignore[assignment]
        self._ddp = None
        self._reducing = self._expected = False  # of a step that ended with the group
        self._on_their_way = _nothing
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def model(self) -> nn.Module:
        return self.loss.model

    @property
    def rebuild_bytes(self) -> int:
        """Bytes that DDP takes for a moment once it knows the order in which gradients come.

        It lays out new buckets in that order beside the old ones, at the start of the forward after the first
        reduction.
        """
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    @property
    def reduction_began(self) -> bool:
        """Whether gradients of this step are on their way to the other ranks, or the next ones will be."""
        return self._expected or bool(self._reduced)

    @property
    def loss_sum(self) -> float:
        """Summed loss of the step's micro-batches so far."""
        return sum(map(float, self._losses))

    def start_step(self, on_their_way: Callable[[], None] = _nothing) -> None:
        """Zero the gradients, in place: they stay views of the buckets that are reduced.

        on_their_way: called once in the step, when all gradients have been handed in and those of other ranks
            may not have come: what it hands in itself travels beside them
        """
        self._reduced.clear()
        self._reducing = self._expected = False
        self._losses.clear()
        self._on_their_way = on_their_way
        torch._foreach_zero_([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def backward(self, batch: tuple[Any, Any] | None, scale: float, *, reduce: bool) -> None:
        """Forward and backward of one micro-batch.

        The last micro-batch of a step is the one to `reduce`, on every rank; a rank without samples
        passes None for it.
        """
        assert self._ddp is not None, "connect first"
        self._reducing = reduce
        with contextlib.nullcontext() if reduce else self._ddp.no_sync():
            loss = self._ddp(batch)
            self._expected = reduce
            self._losses.append(loss.detach())
            if loss.requires_grad:
                (loss * scale).backward()
            if reduce:
                self.finish_reduction()

    def finish_reduction(self) -> None:
        """Contribute zeros for every parameter whose gradient did not come, so that no peer waits for it.

        That is one the loss does not depend on, all of them where the rank has no sample, and those
        that a backward left out when it ran out of memory halfway.
        """
        if len(self._reduced) < len(self.parameters):
            missing = [parameter for parameter in self.parameters if id(parameter) not in self._reduced]
            zeros = [torch.zeros((), dtype=p.dtype, device=p.device).expand_as(p) for p in missing]
            torch.autograd.backward(missing, zeros)
        self._expected = False

    def average_buffers(self, weight: float) -> None:
        """Average floating-point buffers over ranks, weighted: all ranks hold the same ones afterwards."""
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        flat = torch.cat([buffer.flatten().double() for buffer in buffers]).mul_(weight)
        flat = torch.cat([flat, flat.new_tensor([weight])])
        dist.all_reduce(flat)
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, mean in zip(buffers, torch.split(flat[:-1] / flat[-1], sizes), strict=True):
            buffer.copy_(mean.view_as(buffer))

    def _note(self, parameter: Tensor) -> None:
        if not self._reducing:
            return
        self._reduced.add(id(parameter))
        self.compute_ended_s = time.perf_counter()
        if len(self._reduced) == len(self.parameters):
            self._reducing = False  # a backward between this step and the next, to measure, hands nothing in
            # Runs when DDP has handed in its last bucket, and before DDP waits for the other ranks'.
            torch.autograd.Variable._execution_engine.queue_callback(self._on_their_way)


def move_batch(batch: Any, device: torch.device, precision: str) -> tuple[Any, Any]:
    """A fetched `(input, target)` on the device; floating-point inputs in the run's precision."""
    inputs, target = batch
    dtype = torch.float64 if precision == "fp64" and inputs.is_floating_point() else None
    return inputs.to(device, dtype, non_blocking=True), target.to(device, non_blocking=True)

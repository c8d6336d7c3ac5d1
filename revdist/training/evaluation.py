"""Scoring the test data at the end of a run, each rank a slice of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from revdist.training.data import consecutive, slice_of
from revdist.training.replicated import Replicated, move_batch
from revdist.training.reports import Score


@torch.no_grad()
def evaluate(
    replicated: Replicated,
    dataset: Any,
    *,
    shares: tuple[int, ...],
    rank: int,
    micro_batch: int,
    device: torch.device,
    precision: str,
) -> Score:
    """Score a dataset: every rank takes a slice in proportion to its share and all get the same score."""
    replicated.average_buffers(shares[rank])
    model = replicated.model
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in consecutive(dataset, micro_batch, slice_of(shares, rank, len(dataset))):
        sums += _score_batch(replicated, move_batch(batch, device, precision))
    model.train(was_training)
    dist.all_reduce(sums)
    samples, loss_sum, num_correct = sums.tolist()
    return Score(
        samples=int(samples),
        loss=loss_sum / samples,
        accuracy=None if num_correct < 0 else num_correct / samples,
    )


def _score_batch(replicated: Replicated, batch: tuple[Any, Any]) -> Tensor:
    """Float64 (3,): samples, summed loss, and correct ones, or minus infinity where targets are not classes."""
    inputs, target = batch
    loss = replicated.loss
    with loss.autocast(inputs):
        output = loss.model(inputs)
        loss_sum = loss.loss_fn(output, target, reduction="sum")
    classes = not target.is_floating_point() and output.dim() == target.dim() + 1
    correct = float((output.argmax(1) == target).sum()) / max(1, target[0].numel()) if classes else float("-inf")
    return torch.tensor([len(target), float(loss_sum), correct], dtype=torch.float64)

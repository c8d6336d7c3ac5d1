"""Probes of what a step leaves behind: inputs, statistics, copies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from benchmarks.peers.behaviour import Answer, Probe, Trial, Verdict, all_of, compare, features, image
from benchmarks.peers.probes_gradients import normalized


def _intact(tensor: Tensor, original: Tensor, what: str) -> Verdict:
    num_bytes = tensor.untyped_storage().nbytes()
    if num_bytes < original.untyped_storage().nbytes():
        return Verdict(Answer.SILENT, f"the storage of the {what} has {num_bytes} bytes left")
    if not torch.equal(tensor, original):
        return Verdict(Answer.SILENT, f"the {what} is changed")
    return Verdict(Answer.YES)


def batch_intact(trial: Trial) -> Verdict:
    _, network = trial.pair(normalized)
    batch = features()
    loss = network.body(batch).square().mean()
    after_forward = _intact(batch, features(), "batch after the forward")
    if loss.requires_grad:
        loss.backward()
    return all_of(after_forward, _intact(batch, features(), "batch after the step"))


def pool_intact(trial: Trial) -> Verdict:
    _, network = trial.pair(normalized)
    pool = torch.cat([features(), features()])
    original = pool.clone()
    network.body(pool[: len(pool) // 2])
    return _intact(pool, original, "data set that the batch is a view of")


def evaluation(trial: Trial) -> Verdict:
    reference, network = (net.eval() for net in trial.pair(normalized))
    batch = features()
    with torch.no_grad():
        of_reference, of_network = reference.body(features()), network.body(batch)
    return all_of(_intact(batch, features(), "batch"), compare([of_network], [of_reference], "output"))


def batch_statistics(trial: Trial) -> Verdict:
    reference, network = trial.pair(normalized)
    for net in (reference, network):
        net(image()).square().mean().backward()
    norm = network.branches[0][0].get_submodule("0")
    updates = int(norm.num_batches_tracked)  # type: ignore[arg-type]
    if updates != 1:
        return Verdict(Answer.SILENT, f"updated {updates} times in one step")
    of_reference, of_network = (
        [buffer.double() for pair in net.branches for branch in pair for buffer in branch.buffers()]
        for net in (reference, network)
    )
    return compare(of_network, of_reference, "statistic")


def deep_copy(trial: Trial) -> Verdict:
    reference, network = trial.pair(normalized)
    network(image()).square().mean()  # a forward leaves state in some
    twin = copy.deepcopy(network)
    twin.branches = []  # parameters are those of the copy's body
    for net in (reference, twin):
        net(image()).square().mean().backward()
    of_twin = [parameter.grad for parameter in twin.body.parameters()]
    return compare(sorted_by_size(of_twin), sorted_by_size(reference.body_gradients()))


def sorted_by_size(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """In an order that does not depend on that of a library's modules."""
    return sorted(tensors, key=lambda tensor: float("inf") if tensor is None else float(tensor.norm()))


PROBES = (
    Probe("batch-intact", "The batch is left as it was", batch_intact),
    Probe("pool-intact", "So is the data set that it is a view of", pool_intact),
    Probe("evaluation", "Evaluation without gradients", evaluation),
    Probe("batch-norm", "BatchNorm statistics updated once", batch_statistics),
    Probe("deepcopy", "A deep copy trains", deep_copy),
)

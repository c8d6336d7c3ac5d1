"""What a backward that fails leaves allocated, and who frees it."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor

from revdist.models import RevNet
from revdist.reversible import profile_chain
from revdist.reversible.engine import let_pending_go

MIB = 2**20


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")


def fail_with_a_branch_to_go() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)
    first, second = (x * 1).chunk(2)
    torch.cat([first.exp().exp(), Failing.apply(second)]).sum().backward()


@pytest.mark.parametrize("in_thread", [False, True])
def test_what_a_failed_backward_had_yet_to_run_goes(in_thread: bool, activated) -> None:
    meter = activated(64 * MIB).meter()
    left: list[int] = []

    def fail_and_let_go() -> None:
        before = meter.allocated_bytes()
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                fail_with_a_branch_to_go()
        left.append(meter.allocated_bytes() - before)
        let_pending_go()
        left.append(meter.allocated_bytes() - before)

    if in_thread:
        thread = threading.Thread(target=fail_and_let_go)
        thread.start()
        thread.join()
    else:
        fail_and_let_go()
    assert left[0] >= MIB, "torch lets it go by itself now: revdist.reversible.engine is no longer needed"
    assert left[1] == 0


def test_a_device_with_more_memory_is_never_profiled_for_less(activated) -> None:
    """Nor does anything stay allocated, wherever in a step memory runs out."""
    found: list[list[int]] = []
    """By capacity: how many modes each operator has; nothing where not even the most frugal schedule fits."""
    for number, capacity_bytes in enumerate(range(1000, 300, -40)):
        device = activated(capacity_bytes * 1024, name=f"cpu-{number}")
        model, x = RevNet((2, 2), (8, 8, 16), num_classes=5), torch.randn(8, 3, 16, 16)
        before = device.meter().allocated_bytes()
        try:
            profile = profile_chain(model, x, lambda output: output.square().sum(), meter=device.meter(), repeats=1)
        except torch.OutOfMemoryError:
            found.append([])
        else:
            found.append([len(options) for options in profile.options])
        assert device.meter().allocated_bytes() == before
        device.deactivate()
    assert found[0]
    assert not found[-1], "no shortage was met"
    assert any(fewer and fewer != found[0] for fewer in found), "nothing was left out for want of memory"
    for more, less in itertools.pairwise(found):
        assert not less or all(one >= other for one, other in zip(more, less, strict=True))

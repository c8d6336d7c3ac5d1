"""Carries out a checkpoint planner's plan with torch.utils.checkpoint, on the operators of a chain."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.planners.checkpointing import Last, Plan, Save
from revdist.reversible.boundary import converted
from revdist.reversible.chain import ReversibleChain
from revdist.reversible.operator import Operator, Streams


class PlanRunner(nn.Module):
    """Images to logits, every operator run plainly: what is dropped is run again as the plan says."""

    def __init__(self, chain: ReversibleChain, plan: Plan) -> None:
        super().__init__()
        self.chain = chain
        self.plan = plan

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._run(self.plan, (images_BCHW,))[0]

    @staticmethod
    def entering(chain: ReversibleChain, operator: Operator, streams: Streams) -> Streams:
        """The streams as the operator takes them."""
        return converted(streams, operator.num_streams, chain.split_dim)

    def _run(self, plan: Plan, streams: Streams) -> Streams:
        while not isinstance(plan, Last):
            if isinstance(plan, Save):
                streams = self._operator(plan.first, streams)
                plan = plan.rest
            else:
                streams = self._dropped(plan.left, streams)
                plan = plan.right
        return self._operator(plan.first, streams)

    def _dropped(self, plan: Plan, streams: Streams) -> Streams:
        """Run a part that the backward runs again, by a plan of its own."""
        outputs: Streams = checkpoint(lambda *inputs: self._run(plan, inputs), *streams, use_reentrant=False)
        return outputs

    def _operator(self, number: int, streams: Streams) -> Streams:
        operator = self.chain.operators[number]
        return operator.forward(self.entering(self.chain, operator, streams))


def save_all(first: int, end: int) -> Plan:
    """The plan that drops nothing of operators first..end-1."""
    plan: Plan = Last(end - 1)
    for operator in range(end - 2, first - 1, -1):
        plan = Save(operator, plan)
    return plan

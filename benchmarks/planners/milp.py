"""The exact model as a mixed-integer linear program, solved by HiGHS through scipy.

Variables: x[i, c] in {0, 1}, operator i takes option c; p[i] >= 0, bytes held by operators 0..i.

    minimise  sum extra[i, c] x[i, c]
    sum_c x[i, c] = 1,   p[i] = p[i-1] + sum_c held[i, c] x[i, c],   p[i] + sum_c working[i, c] x[i, c] <= budget

Bytes count in MiB, so that the solver's tolerance of 1e-6 is about one byte.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize
import scipy.sparse

from benchmarks.planners.families import MIB, Chain
from benchmarks.planners.solvers import Planner

TIME_LIMIT_S = 10.0


class Highs(Planner):
    name = "HiGHS MILP"
    most_budgets = 5

    def __init__(self, chain: Chain, largest_budget: int) -> None:
        super().__init__(chain, largest_budget)
        options = chain.profile.options
        owner = np.array([index for index, choices in enumerate(options) for _ in choices])
        held, working, self.extra_s = (
            np.array([getattr(option, name) for choices in options for option in choices], float)
            for name in ("held_bytes", "working_bytes", "extra_s")
        )
        n, k = len(options), len(owner)
        select = scipy.sparse.csr_array((np.ones(k), (owner, np.arange(k))), (n, k))
        before = scipy.sparse.eye_array(n) - scipy.sparse.eye_array(n, k=-1)
        self.one_option = scipy.sparse.hstack([select, scipy.sparse.csr_array((n, n))])
        self.prefix = scipy.sparse.hstack([-select * (held / MIB), before])
        self.peak = scipy.sparse.hstack([select * (working / MIB), scipy.sparse.eye_array(n)])
        self.num_choices = k
        self.num_operators = n

    def solve(self, budget_bytes: int) -> object | None:
        room = (budget_bytes - self.chain.profile.outside_bytes) / MIB
        free = np.zeros(self.num_operators)
        found = scipy.optimize.milp(
            c=np.concatenate([self.extra_s, free]),
            integrality=np.concatenate([np.ones(self.num_choices), free]),
            bounds=scipy.optimize.Bounds(0, np.concatenate([np.ones(self.num_choices), free + np.inf])),
            constraints=[
                scipy.optimize.LinearConstraint(self.one_option, 1, 1),
                scipy.optimize.LinearConstraint(self.prefix, 0, 0),
                scipy.optimize.LinearConstraint(self.peak, -np.inf, room),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        )
        if found.x is None:
            return None
        chosen = iter(found.x[: self.num_choices])
        return [max((next(chosen), option.mode) for option in choices)[1] for choices in self.chain.profile.options]

"""The greedy baseline: bytes go where they save most predicted loss."""

from __future__ import annotations

from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._knapsack import greedy
from kvloom.allocate._problem import Problem
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import Profile


@register
class Greedy(Allocator):
    """Starts from the cheapest formats and buys, as long as anything fits, the one that saves most loss a byte.

    The textbook heuristic of the multiple-choice knapsack (Sinha and Zoltners, *The multiple-choice knapsack problem*,
    1979), which knows the same table as the exact method and proves nothing.

    Args:
        by_head: see `Exact`.
    """

    name = "greedy"

    def __init__(self, by_head: bool = False) -> None:
        self._by_head = by_head

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Makes the plan.

        Raises:
            PlanError: there is no budget, not even the cheapest candidates fit into it, or heads are to decide and
                cannot (see `Exact`).
        """
        problem = Problem.of(profile, budget, window, prefill, self.name, self._by_head)
        return problem.plan(greedy(problem.options, problem.capacity), self.name)

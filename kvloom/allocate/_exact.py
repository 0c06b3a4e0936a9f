"""The exact allocator: the least predicted loss that any plan within the budget can have."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._constraints import Constraints
from kvloom.allocate._knapsack import Solution, solve
from kvloom.allocate._milp import solve_constrained
from kvloom.allocate._problem import Problem
from kvloom.allocate._tokens import LayerUnit
from kvloom.allocate._units import Unit
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import Profile


@register
class Exact(Allocator):
    """Solves the multiple-choice knapsack over layers (or KV heads) x {K, V} x candidate formats to optimality.

    The plan's `provenance.certificate` holds the proof: `optimum` (the predicted loss),
    `lower_bound` (what the search over all plans proves, hence `gap` 0) and `lagrangian_bound`, a
    lower bound computed in another way (the Lagrangian dual, which no plan within the budget can
    fall below), with `units`, `specs` (options of the largest unit), `capacity_bytes`,
    `used_bytes` and `seconds`. Of thousands of units a search can be too long: then `lower_bound` is
    the Lagrangian one and `gap` says how much of `optimum` is not proven. Under side constraints both
    bounds are those of branch and cut.

    Args:
        constraints: what the plan must keep to besides the budget.
        by_head: whether every KV head decides by itself, by the table's losses of heads.
    """

    name = "exact"

    def __init__(self, constraints: Constraints | None = None, by_head: bool = False) -> None:
        self._constraints = constraints or Constraints()
        self._by_head = by_head

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Makes the plan of least predicted loss; among equals, without side constraints, the smallest.

        Raises:
            PlanError: there is no budget, not even the cheapest candidates fit into it, no plan within it keeps to the
                constraints, or heads are to decide and cannot (the table does not tell them apart, or candidates have
                pages of different lengths or codebooks, which heads share).
            MissingExtraError: there are constraints, and scipy is not installed.
        """
        started = time.perf_counter()
        problem = Problem.of(profile, budget, window, prefill, self.name, self._by_head)
        self._constraints.check(profile.model)
        problem, solution = self._solved(problem)
        proof = certificate(problem.units, solution, problem.capacity, time.perf_counter() - started)
        if self._constraints:
            proof["constraints"] = str(self._constraints)
        return problem.plan(solution.picks, self.name, proof)

    def _solved(self, problem: Problem) -> tuple[Problem, Solution]:
        if not self._constraints:
            return problem, solve(problem.options, problem.capacity)
        found = solve_constrained(problem.units, problem.capacity, self._constraints)
        return replace(problem, units=found.units), found.solution


def certificate(units: Sequence[Unit | LayerUnit], solution: Solution, capacity: int, seconds: float) -> dict[str, Any]:
    """What proves a solution; see `Exact`."""
    return {
        "optimum": solution.loss,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "lagrangian_bound": solution.bound,
        "units": len(units),
        "specs": max(len(unit.choices) for unit in units),
        "capacity_bytes": capacity,
        "used_bytes": solution.cost,
        "seconds": round(seconds, 6),
    }

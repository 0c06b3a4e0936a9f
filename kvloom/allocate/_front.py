"""The Pareto front of memory and predicted loss: the exact plan of every size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvloom.allocate._budget import Budget
from kvloom.allocate._constraints import Constraints
from kvloom.allocate._exact import Exact
from kvloom.allocate._milp import least_cost
from kvloom.allocate._problem import Problem
from kvloom.errors import PlanError
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import Profile

_UNLIMITED = 2**50
"""More bytes than any plan takes."""


@dataclass(frozen=True)
class ExactFront:
    """All exact plans of a profile, made as they are asked for.

    Attributes:
        profile: what was measured about the model.
        tokens: context length at which bytes count.
        batch: number of sequences.
        dtype: compute dtype of the tokens kept exactly; None takes the model's.
        constraints: what every plan must keep to.
        window: tokens every layer keeps exactly; None takes those the profile was measured with.
        prefill: how a prompt attends, `exact` or `quantized`.
        by_head: whether every KV head decides by itself, see `Exact`.
    """

    profile: Profile
    tokens: int
    batch: int = 1
    dtype: str | None = None
    constraints: Constraints | None = None
    window: Window | None = None
    prefill: Prefill = "exact"
    by_head: bool = False

    def plan(self, nbytes: int) -> Plan:
        """The exact plan of at most so many bytes.

        Raises:
            PlanError: there is none, see `Exact`.
        """
        budget = Budget.memory(nbytes, self.batch, self.tokens, self.dtype)
        exact = Exact(self.constraints, self.by_head)
        return exact.solve(self.profile, budget, window=self._window, prefill=self.prefill)

    @cached_property
    def largest(self) -> Plan:
        """The plan of least loss there is; among equals, without side constraints, the smallest."""
        return self.plan(_UNLIMITED)

    @cached_property
    def least(self) -> int:
        """Bytes of the smallest plan.

        Raises:
            PlanError: no plan keeps to the constraints.
        """
        budget = Budget.memory(_UNLIMITED, self.batch, self.tokens, self.dtype)
        problem = Problem.of(self.profile, budget, self._window, self.prefill, Exact.name, self.by_head)
        return least_cost(problem.units, self.constraints or Constraints())

    def nbytes(self, plan: Plan) -> int:
        """Bytes of a plan at the front's batch and context."""
        return plan.nbytes(self.batch, self.tokens, self.dtype)

    def plans(self, points: int = 40) -> list[Plan]:
        """Plans from the smallest to the largest, each with less predicted loss than all smaller ones.

        Args:
            points: budgets, in equal ratios; one that buys nothing new makes no plan.

        Raises:
            PlanError: `points` is below 2, or no plan keeps to the constraints.
        """
        if points < 2:
            raise PlanError(f"points is {points}: give at least 2, the smallest plan and the largest")
        most = self.nbytes(self.largest)
        budgets = np.geomspace(self.least, most, points).round().astype(int)[1:-1]
        kept: list[Plan] = []
        for plan in [*map(self.plan, [self.least, *map(int, budgets)]), self.largest]:
            if not kept or predicted_loss(plan) < predicted_loss(kept[-1]):
                kept.append(plan)
        return kept

    @property
    def _window(self) -> Window:
        return self.profile.table.window if self.window is None else self.window


def predicted_loss(plan: Plan) -> float:
    """What the loss table predicted of a plan that a method made of it."""
    assert plan.provenance
    assert plan.provenance.predicted_loss is not None
    return plan.provenance.predicted_loss

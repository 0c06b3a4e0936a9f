"""The exact allocator: the least predicted loss that any plan within the budget can have."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._knapsack import Solution, cheapest, solve
from kvloom.allocate._units import Choice, Unit, units_of
from kvloom.errors import PlanError
from kvloom.plan import Plan, Prefill, Provenance, TensorSpec, Window
from kvloom.signals import Profile


@register
class Exact(Allocator):
    """Solves the multiple-choice knapsack over layers x {K, V} x candidate formats to optimality.

    The plan's `provenance.certificate` holds the proof: `optimum` (the predicted loss),
    `lower_bound` (what the search over all plans proves, hence `gap` 0) and `lagrangian_bound`, a
    lower bound computed in another way (the Lagrangian dual, which no plan within the budget can
    fall below), with `units`, `specs` (options of the largest unit), `capacity_bytes`,
    `used_bytes` and `seconds`.
    """

    name = "exact"

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Makes the plan of least predicted loss; among equals, the smallest.

        Raises:
            PlanError: there is no budget, or not even the cheapest candidates fit into it.
        """
        if budget is None:
            raise PlanError("budget is missing: method 'exact' needs one, such as Budget.bits(3, 2048)")
        started = time.perf_counter()
        units = units_of(profile.table, budget, window)
        options = [unit.options for unit in units]
        capacity = budget.total(profile.model)
        least = cheapest(options)
        if least > capacity:
            raise PlanError(_too_small(budget, capacity, least, profile))
        solution = solve(options, capacity)
        seconds = time.perf_counter() - started
        return Plan.from_specs(
            profile.model,
            _specs(units, solution.picks),
            window=window,
            prefill=prefill,
            provenance=Provenance(
                signal=profile.table.signal,
                solver=self.name,
                budget=asdict(budget),
                calibration=profile.calibration.model_dump(),
                predicted_loss=solution.loss,
                certificate=_certificate(units, solution, capacity, seconds),
            ),
        )


def _specs(units: Sequence[Unit], picks: Sequence[int]) -> dict[int, tuple[TensorSpec, TensorSpec]]:
    layers: dict[int, Choice] = {}
    for unit, pick in zip(units, picks, strict=True):
        layers.setdefault(unit.layer, {}).update(unit.choices[pick])
    return {layer: (sides["key"], sides["value"]) for layer, sides in layers.items()}


def _certificate(units: Sequence[Unit], solution: Solution, capacity: int, seconds: float) -> dict[str, Any]:
    return {
        "optimum": solution.loss,
        "lower_bound": solution.loss,
        "gap": 0.0,
        "lagrangian_bound": solution.bound,
        "units": len(units),
        "specs": max(len(unit.choices) for unit in units),
        "capacity_bytes": capacity,
        "used_bytes": solution.cost,
        "seconds": round(seconds, 6),
    }


def _too_small(budget: Budget, capacity: int, least: int, profile: Profile) -> str:
    reach = budget.true_bits(least, profile.model)
    return (
        f"budget of {budget} is {capacity} bytes, and the smallest plan of this profile's "
        f"candidates takes {least} bytes ({reach:.4g} true bits): raise the budget, keep a smaller "
        "window, or profile with fewer bits among the candidates"
    )

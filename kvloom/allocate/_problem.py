"""The problem every method solves: a profile's units, and the bytes a plan may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvloom.allocate._budget import Budget
from kvloom.allocate._knapsack import Options, cheapest
from kvloom.allocate._units import Unit, specs_of, units_of
from kvloom.errors import PlanError
from kvloom.plan import Fingerprint, Plan, Prefill, Provenance, Window
from kvloom.signals import Profile

SMALLEST = "the smallest plan of this profile's candidates"


@dataclass(frozen=True, slots=True)
class Problem:
    """Pick a choice of every unit so that the plan has at most `capacity` bytes.

    Attributes:
        profile: what was measured.
        budget: where the capacity comes from.
        window: tokens every layer keeps exactly.
        prefill: how a prompt attends, `exact` or `quantized`.
        units: the decisions; their costs add up to the plan's bytes and their losses to its predicted loss.
        capacity: bytes of all the budget's sequences.
    """

    profile: Profile
    budget: Budget
    window: Window
    prefill: Prefill
    units: tuple[Unit, ...]
    capacity: int

    @classmethod
    def of(
        cls,
        profile: Profile,
        budget: Budget | None,
        window: Window,
        prefill: Prefill,
        method: str,
        by_head: bool = False,
    ) -> Problem:
        """The problem of a method that needs a budget.

        Raises:
            PlanError: there is none, not even the cheapest candidates fit into it, or heads cannot decide by themselves
                (see `units_of`).
        """
        budget = check_budget(budget, method)
        units = tuple(units_of(profile.table, budget, window, by_head))
        problem = cls(profile, budget, window, prefill, units, budget.total(profile.model))
        least = cheapest(problem.options)
        if least > problem.capacity:
            raise PlanError(problem.too_small(least))
        return problem

    @property
    def options(self) -> list[Options]:
        """Costs and losses of the units."""
        return [unit.options for unit in self.units]

    def nbytes(self, picks: Sequence[int]) -> int:
        """Bytes of the plan that these picks make."""
        return sum(int(unit.cost[pick]) for unit, pick in zip(self.options, picks, strict=True))

    def loss(self, picks: Sequence[int]) -> float:
        """Predicted loss of the plan that these picks make, in nats of KL divergence per scored token."""
        return float(sum(unit.loss[pick] for unit, pick in zip(self.options, picks, strict=True)))

    def plan(self, picks: Sequence[int], solver: str, certificate: dict[str, Any] | None = None) -> Plan:
        """The plan that these picks make, with its provenance."""
        model = self.profile.model
        return Plan.from_head_specs(
            model,
            specs_of(self.units, picks, model.num_kv_heads),
            window=self.window,
            prefill=self.prefill,
            provenance=Provenance(
                signal=self.profile.table.signal,
                solver=solver,
                budget=asdict(self.budget),
                calibration=self.profile.calibration.model_dump(),
                predicted_loss=self.loss(picks),
                certificate=certificate,
            ),
        )

    def too_small(self, least: int, reason: str = SMALLEST) -> str:
        """Why a budget below `least` bytes cannot be met, and what to do."""
        return too_small(self.budget, self.profile.model, least, reason)


def check_budget(budget: Budget | None, method: str) -> Budget:
    """The budget of a method that needs one.

    Raises:
        PlanError: there is none.
    """
    if budget is None:
        raise PlanError(f"budget is missing: method {method!r} needs one, such as --bits 3 or Budget.bits(3, 2048)")
    return budget


def too_small(budget: Budget, model: Fingerprint, least: int, reason: str = SMALLEST) -> str:
    """Why a budget below `least` bytes cannot be met, and what to do."""
    return (
        f"budget of {budget} is {budget.total(model)} bytes, and {reason} takes {least} bytes "
        f"({budget.true_bits(least, model):.4g} true bits): raise the budget, keep a smaller window, or profile with "
        "fewer bits among the candidates"
    )

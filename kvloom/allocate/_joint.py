"""The joint optimum of tokens and bits: eviction is zero bits."""

from __future__ import annotations

import time
from dataclasses import asdict

from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._exact import certificate
from kvloom.allocate._knapsack import cheapest, solve
from kvloom.allocate._problem import check_budget, too_small
from kvloom.allocate._tokens import layer_units
from kvloom.errors import PlanError
from kvloom.plan import Plan, Prefill, Provenance, Window
from kvloom.signals import EvictionTable, Profile

AUTO = "auto"
"""Every layer takes the policy that loses least, of those that were measured."""


@register
class Joint(Allocator):
    """Chooses for every layer how many tokens it keeps, by which policy, and the formats of its keys and values.

    Solves the multiple-choice knapsack over layers x {all tokens, candidate evictions} x key formats x value formats to
    optimality, with true bytes at the budget's batch and tokens (pages, exact tokens, places of kept tokens). The
    profile's losses of evictions and of formats add up. `provenance.certificate` is that of method `exact`.

    Args:
        policy: the one policy of all layers that evict, or `auto`.
    """

    name = "joint"

    def __init__(self, policy: str = AUTO) -> None:
        self._policy = policy

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Makes the plan of least predicted loss; among equals the smallest.

        Raises:
            PlanError: there is no budget, not even the cheapest candidates fit into it, the profile has no losses of
                evictions or none of the policy, or a layer is to evict and `prefill` is not `exact`.
        """
        started = time.perf_counter()
        budget, table = check_budget(budget, self.name), _table(profile)
        units = layer_units(profile.table, table, _policies(table, self._policy), budget, window)
        options, capacity = [unit.options for unit in units], budget.total(profile.model)
        least = cheapest(options)
        if least > capacity:
            raise PlanError(too_small(budget, profile.model, least))
        found = solve(options, capacity)
        chosen = {unit.layer: unit.choices[pick] for unit, pick in zip(units, found.picks, strict=True)}
        return Plan.from_specs(
            profile.model,
            {layer: (own.key, own.value) for layer, own in chosen.items()},
            window=window,
            evict={layer: own.evict for layer, own in chosen.items()},
            prefill=prefill,
            provenance=Provenance(
                signal=profile.table.signal,
                solver=self.name,
                budget=asdict(budget),
                calibration=profile.calibration.model_dump(),
                predicted_loss=found.loss,
                certificate=certificate(units, found, capacity, time.perf_counter() - started),
            ),
        )


def _table(profile: Profile) -> EvictionTable:
    """The profile's losses of evictions.

    Raises:
        PlanError: there are none.
    """
    if profile.eviction is None:
        raise PlanError("the profile has no losses of evictions: make one with `kvloom profile MODEL --evict auto`")
    return profile.eviction


def _policies(table: EvictionTable, policy: str) -> tuple[str, ...]:
    """The policies a layer may take.

    Raises:
        PlanError: the one asked for was not measured.
    """
    if policy == AUTO:
        return table.policies
    if policy not in table.policies:
        raise PlanError(
            f"the profile has no losses of policy {policy!r} (it has {', '.join(table.policies)}): profile with "
            f"--evict {policy}"
        )
    return (policy,)

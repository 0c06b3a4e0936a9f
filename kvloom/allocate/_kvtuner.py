"""KVTuner's pipeline: prune the formats of each layer, group the layers, search the groups by measurement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvloom._extras import require
from kvloom.allocate._base import Allocator, register
from kvloom.allocate._budget import Budget
from kvloom.allocate._groups import Group, grouped, pruned
from kvloom.allocate._knapsack import cheapest, solve
from kvloom.allocate._ladder import ladder
from kvloom.allocate._problem import Problem
from kvloom.allocate._study import Found, Picks, Space, StudySettings, run_study
from kvloom.allocate._units import Specs, Unit, paired_units, picks_of
from kvloom.errors import PlanError
from kvloom.plan import Plan, Prefill, Window
from kvloom.signals import LossTable, Profile

_STARTS = 16


@dataclass(frozen=True, slots=True)
class Objective:
    """What a search measures of a plan, to be small.

    Attributes:
        name: what it is, and on what: processes that name another one cannot join a study.
        of: plan -> the figure.
    """

    name: str
    of: Callable[[Plan], float]


def _unheard(what: str, done: int, total: int) -> None:
    """Progress nobody watches."""


@register
class KVTuner(Allocator):
    """The search of KVTuner (arXiv 2502.04420, sections 5.2 and 5.3).

    Each layer keeps the pairs of a key and a value format that no other beats in bytes and loss; layers of the same
    pairs and of close losses become a group (see `grouped`); an evolutionary search picks a pair for every group, for
    little loss and few bytes, under a limit of bytes that trials may break. What is done otherwise: losses are those of
    the profile's table, whatever its signal (KVTuner's is e_o); true bytes stand for average bits; formats are the
    profile's; the search is seeded, and starts from exact plans of the groups unless `warm` is False; a trial's
    objective is by default the table's predicted loss, and with `objective` any measured one (KVTuner's is the accuracy
    on GSM8K).

    Args:
        objective: what trials measure.
        settings: trials, sampler, seed, and the storage that processes share.
        widths: bits of keys and of values that pairs are made of, where the profile has them.
        warm: whether the first trials are the exact plans of the groups at 16 budgets; KVTuner starts at random.
        progress: told `(what, done, total)` before every trial.
    """

    name = "kvtuner"

    def __init__(
        self,
        objective: Objective | None = None,
        settings: StudySettings | None = None,
        widths: Sequence[int] = (2, 4, 8),
        warm: bool = True,
        progress: Callable[[str, int, int], None] = _unheard,
    ) -> None:
        self._objective = objective
        self._settings = settings or StudySettings()
        self._widths = widths
        self._warm = warm
        self._progress = progress

    def solve(self, profile: Profile, budget: Budget | None, *, window: Window, prefill: Prefill) -> Plan:
        """Searches, and makes the best plan found within the budget; among equals the smallest.

        Raises:
            PlanError: there is no budget, keys or values have none of the widths, not even the smallest pairs fit, or
                no trial kept to the budget.
            MissingExtraError: optuna or scipy is not installed.
        """
        problem, groups, found = self._searched(profile, budget, window, prefill)
        within = [it for it in found if it.values[1] <= problem.capacity]
        if not within:
            raise PlanError(f"none of {len(found)} trials kept to the budget of {budget}: give more, or start warm")
        return self._plan(problem, groups, min(within, key=lambda it: it.values), len(found))

    def front(self, profile: Profile, budget: Budget, *, window: Window, prefill: Prefill = "exact") -> list[Plan]:
        """Searches, and makes all plans that no other found beats in both objectives, by rising bytes.

        Raises:
            PlanError: see `solve`.
            MissingExtraError: see `solve`.
        """
        problem, groups, found = self._searched(profile, budget, window, prefill)
        plans, least = [], float("inf")
        for it in sorted(found, key=lambda it: it.values[::-1]):
            if it.values[0] < least:
                least = it.values[0]
                plans.append(self._plan(problem, groups, it, len(found)))
        return plans

    def _searched(
        self, profile: Profile, budget: Budget | None, window: Window, prefill: Prefill
    ) -> tuple[Problem, list[Group], list[Found]]:
        require("search", "KVTuner's search")
        problem = Problem.of(profile, budget, window, prefill, self.name)
        groups = grouped([pruned(unit) for unit in self._of_widths(problem)])
        options = [group.options for group in groups]
        if (least := cheapest(options)) > problem.capacity:
            raise PlanError(problem.too_small(least, f"the smallest plan of widths {list(self._widths)}"))

        def measure(picks: Picks) -> tuple[float, float]:
            chosen = picks_of(problem.units, _specs(groups, picks))
            loss = self._objective.of(problem.plan(chosen, self.name)) if self._objective else problem.loss(chosen)
            return loss, float(problem.nbytes(chosen))

        def excess(picks: Picks) -> float:
            return float(problem.nbytes(picks_of(problem.units, _specs(groups, picks))) - problem.capacity)

        capacities = np.linspace(problem.capacity, least, _STARTS).astype(int) if self._warm else ()
        starts = dict.fromkeys(solve(options, int(capacity)).picks for capacity in capacities)
        space = Space(
            sizes=tuple(len(group.choices) for group in groups),
            measure=measure,
            excess=excess,
            starts=tuple(starts),
            about=self._about(problem, groups),
        )
        return problem, groups, run_study(space, self._settings, self._progress)

    def _of_widths(self, problem: Problem) -> list[Unit]:
        """A unit a layer, of the pairs that the widths make."""
        keys, values = self._formats(problem.profile.table)
        units = []
        for unit in paired_units(problem.units):
            kept = [n for n, own in enumerate(unit.choices) if own["key"] in keys and own["value"] in values]
            units.append(unit.only(np.array(kept)))
        return units

    def _formats(self, table: LossTable) -> list[list[Any]]:
        sides = [
            [spec for bits, spec in ladder(specs).items() if bits in self._widths]
            for specs in (table.key_specs, table.value_specs)
        ]
        if not all(sides):
            raise PlanError(
                f"keys or values have none of the widths {list(self._widths)} among their candidates: profile with them"
            )
        return sides

    def _about(self, problem: Problem, groups: Sequence[Group]) -> str:
        said = {
            "table": problem.profile.table.model_dump_json(),
            "budget": str(problem.budget),
            "dtype": problem.budget.dtype,
            "window": problem.window.model_dump(),
            "prefill": problem.prefill,
            "groups": [group.layers for group in groups],
            "objective": self._objective and self._objective.name,
        }
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _plan(self, problem: Problem, groups: Sequence[Group], found: Found, trials: int) -> Plan:
        loss, nbytes = found.values
        proof = {
            "objective": self._objective.name if self._objective else "predicted loss",
            "value": loss,
            "used_bytes": int(nbytes),
            "capacity_bytes": problem.capacity,
            "groups": [list(group.layers) for group in groups],
            "trials": trials,
            "sampler": self._settings.sampler,
            "seed": self._settings.seed,
        }
        return problem.plan(picks_of(problem.units, _specs(groups, found.picks)), self.name, proof)


def _specs(groups: Sequence[Group], picks: Picks) -> Specs:
    chosen = [(group, group.choices[pick]) for group, pick in zip(groups, picks, strict=True)]
    return {layer: (own["key"], own["value"]) for group, own in chosen for layer in group.layers}

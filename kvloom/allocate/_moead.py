"""MOEA/D as an Optuna sampler without a state of its own, so that processes can share a study.

Q. Zhang and H. Li, *MOEA/D: A multiobjective evolutionary algorithm based on decomposition* (IEEE Transactions on
Evolutionary Computation 11(6), 2007). The two objectives are weighed against each other in a fixed number of ways. Each
way is a subproblem whose best trial so far is read from the study; a new trial is bred from those of neighbouring ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

_SUBPROBLEMS = 20
_NEIGHBOURS = 5
_NEARBY = 0.9
"""Share of trials whose parents are neighbours; the others' come from all subproblems."""


class MOEAD(BaseSampler):
    """Proposes integers for a study with two objectives that are to be small.

    Args:
        sizes: variable -> number of its values, from 0 on.
        seed: of this proposal.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int) -> None:
        self._sizes = sizes
        self._random = random.Random(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All variables."""
        return {name: IntDistribution(0, size - 1) for name, size in self._sizes.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A child of two subproblems' best trials, with one value in `variables` changed; at first a random one."""
        past = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(past) < _SUBPROBLEMS:
            return {name: self._random.randrange(size) for name, size in self._sizes.items()}
        mother, father = self._parents(past, trial.number % _SUBPROBLEMS)
        return {
            name: self._random.randrange(size)
            if self._random.random() < 1 / len(self._sizes)
            else self._random.choice((mother, father)).params[name]
            for name, size in self._sizes.items()
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value."""
        return self._random.randrange(self._sizes[param_name])

    def _parents(self, past: Sequence[FrozenTrial], subproblem: int) -> tuple[FrozenTrial, FrozenTrial]:
        pool = range(_SUBPROBLEMS)
        if self._random.random() < _NEARBY:
            pool = range(_SUBPROBLEMS)[max(0, subproblem - _NEIGHBOURS // 2) :][:_NEIGHBOURS]
        one, other = self._random.sample(pool, 2)
        return self._best(past, one), self._best(past, other)

    def _best(self, past: Sequence[FrozenTrial], subproblem: int) -> FrozenTrial:
        """The trial of the least Tchebycheff value (the paper's equation 5); any that keeps to the constraint first."""
        share = subproblem / (_SUBPROBLEMS - 1)
        spans = [(min(values), max(values)) for values in zip(*(trial.values for trial in past), strict=True)]

        def rank(trial: FrozenTrial) -> tuple[float, float]:
            parts = zip((share, 1 - share), trial.values, spans, strict=True)
            distance = max(weight * (value - low) / ((high - low) or 1) for weight, value, (low, high) in parts)
            return sum(max(excess, 0.0) for excess in trial.constraints.values()), distance

        return min(past, key=rank)

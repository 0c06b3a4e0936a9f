"""KVTuner's first two stages: a few formats for each layer, and layers that react alike in one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvloom.allocate._knapsack import Options, efficient
from kvloom.allocate._units import Choice, Unit

_NEIGHBOURS = 0.05
"""DBSCAN's eps as published, for errors such as e_o, whose mean under the coarsest formats is about 1."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that get the same formats.

    Attributes:
        layers: their indices, rising.
        choices: what each option stores in every one of them.
        options: costs in bytes and predicted losses of all of them together.
    """

    layers: tuple[int, ...]
    choices: tuple[Choice, ...]
    options: Options


def pruned(unit: Unit) -> Unit:
    """The layer's Pareto set over bytes and loss: choices that no other beats in both, by rising cost.

    KVTuner (arXiv 2502.04420, section 5.2) does so over average bits and e_o, the relative error of attention outputs.
    """
    return unit.only(efficient(unit.options))


def grouped(units: Sequence[Unit]) -> list[Group]:
    """Layers of the same choices whose losses under each of them are close, in one group each.

    KVTuner clusters by DBSCAN with eps 0.05 and min_samples 2 (Ester et al., *A density-based algorithm for
    discovering clusters*, 1996). With min_samples 2 its clusters are the chains of layers of which each is within eps
    of the next, and its noise the layers near no other, which are groups of their own here. Losses of any table become
    comparable with e_o by a scale: the mean over layers of each layer's largest loss is 1.

    Args:
        units: one a layer, pruned.
    """
    scale = float(np.mean([unit.options.loss.max() for unit in units])) or 1.0
    alike: dict[str, list[Unit]] = {}
    for unit in units:
        alike.setdefault(str(unit.choices), []).append(unit)
    groups = [_group(chain) for own in alike.values() for chain in _chains(own, scale)]
    return sorted(groups, key=lambda group: group.layers)


def _chains(units: Sequence[Unit], scale: float) -> list[list[Unit]]:
    """Units of equal choices, chain by chain."""
    from scipy.sparse.csgraph import connected_components

    losses: NDArray[np.float64] = np.array([unit.options.loss for unit in units]) / scale
    near = np.linalg.norm(losses[:, None] - losses[None], axis=-1) <= _NEIGHBOURS
    count, labels = connected_components(near, directed=False)
    return [[unit for unit, label in zip(units, labels, strict=True) if label == n] for n in range(count)]


def _group(units: Sequence[Unit]) -> Group:
    cost = np.sum([unit.options.cost for unit in units], axis=0)
    loss = np.sum([unit.options.loss for unit in units], axis=0)
    return Group(tuple(unit.layer for unit in units), units[0].choices, Options(cost, loss))

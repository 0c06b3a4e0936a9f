"""Weighted k-means of numbers: the points of the least weighted squared error, as far as Lloyd's iteration finds them.

Numbers are sorted, so that a cluster is a run of neighbours, and sums over runs are differences of running sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 1000


def weighted_kmeans(numbers: Tensor, weights: Tensor, clusters: int) -> Tensor:
    """Rising centres, float64 `[clusters]`, within the range of the numbers or of [-1, 1].

    Lloyd's iteration ("Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982) starts from weighted
    quantiles and from even steps over [-1, 1]; the better end is taken, so that no uniform grid there is better.

    Args:
        numbers: float64 `[n]`, rising.
        weights: float64 `[n]`, not negative, some positive.
        clusters: Number of centres.
    """
    shares = torch.arange(0.5, clusters, dtype=torch.float64) / clusters
    total = weights.cumsum(0)
    quantiles = numbers[torch.searchsorted(total, shares * total[-1]).clamp(max=len(numbers) - 1)]
    ends = [_settled(numbers, weights, start) for start in (quantiles, 2 * shares - 1, _even(clusters))]
    return min(ends, key=lambda centres: squared_error(numbers, weights, centres))


def squared_error(numbers: Tensor, weights: Tensor, centres: Tensor) -> float:
    """Weighted sum of squared distances to the nearest of rising centres."""
    nearest = centres[torch.bucketize(numbers, _edges(centres))]
    return float((weights * (numbers - nearest).square()).sum())


def _even(clusters: int) -> Tensor:
    return torch.linspace(-1, 1, clusters, dtype=torch.float64)


def _settled(numbers: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Where Lloyd's iteration ends; a centre that nothing is nearest to stays."""
    mass, moment = _running(weights), _running(weights * numbers)
    for _ in range(_STEPS):
        inner = torch.searchsorted(numbers, _edges(centres))
        bounds = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(numbers))])
        own, sums = mass[bounds].diff(), moment[bounds].diff()
        # rounding may put the mean of a few equal numbers past a neighbour that nothing is nearest to
        means = torch.where(own > 0, sums / own, centres).sort().values
        if means.equal(centres):
            break
        centres = means
    return centres


def _running(terms: Tensor) -> Tensor:
    return torch.cat([terms.new_zeros(1), terms.cumsum(0)])


def _edges(centres: Tensor) -> Tensor:
    return (centres[1:] + centres[:-1]) / 2

"""Correlations with 95 % intervals.

Pairs are drawn with replacement (Efron 1979), the interval being the 2.5th and 97.5th percentiles of the correlation
over the draws. A draw is a set of weights: how often it takes each pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.errors import DataError
from kvloom.evaluate._bootstrap import Estimate, block_counts

LEAST_PAIRS = 4

_ROUNDING = 1e-10
"""Of the spread of all pairs: a draw with less is one pair over and over."""


def pearson(x: Tensor, y: Tensor) -> Estimate:
    """Pearson's correlation of `[pairs]`.

    Raises:
        DataError: there are too few pairs, or all of one side are equal.
    """
    weights = _weights(x, y)
    return _estimate(_weighted(x.double().expand_as(weights), y.double().expand_as(weights), weights))


def spearman(x: Tensor, y: Tensor) -> Estimate:
    """Spearman's rank correlation of `[pairs]`; equal values share their mean rank (Spearman 1904, Kendall 1945).

    Raises:
        DataError: see `pearson`.
    """
    weights = _weights(x, y)
    return _estimate(_weighted(_ranks(x, weights), _ranks(y, weights), weights))


def _weights(x: Tensor, y: Tensor) -> Tensor:
    """`[1 + draws, pairs]`, the first row for the pairs as they are."""
    if len(x) < LEAST_PAIRS or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        raise DataError(
            f"a correlation needs at least {LEAST_PAIRS} pairs, and not all of one side equal: give more plans."
        )
    counts = block_counts(len(x))
    return torch.cat((torch.ones(1, len(x), dtype=counts.dtype), counts))


def _ranks(values: Tensor, weights: Tensor) -> Tensor:
    """Mean ranks of the values within each draw `[draws, pairs]`, up to a constant."""
    less = (values[None, :] < values[:, None]).double()
    same = (values[None, :] == values[:, None]).double()
    return weights @ (less + same / 2).T


def _weighted(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Weighted correlation of each row of `[draws, pairs]`; NaN where one side does not vary."""
    total = weights.sum(dim=1, keepdim=True)
    x = x - (weights * x).sum(dim=1, keepdim=True) / total
    y = y - (weights * y).sum(dim=1, keepdim=True) / total
    spread = (weights * x * x).sum(dim=1).sqrt() * (weights * y * y).sum(dim=1).sqrt()
    varies = spread > _ROUNDING * spread[0]
    return ((weights * x * y).sum(dim=1) / spread).where(varies, torch.nan)


def _estimate(correlations: Tensor) -> Estimate:
    """The first is the estimate; draws of one pair over and over have none and are left out."""
    return Estimate(correlations[0], correlations[1:][correlations[1:].isfinite()])

"""95 % intervals by block bootstrap.

Neighbouring tokens are not independent, so whole blocks of consecutive tokens are drawn (Kuensch
1989, *The jackknife and the bootstrap for general stationary observations*), with replacement, and
the 2.5th and 97.5th percentiles of the statistic over the draws are the interval (percentile
method, Efron 1979). Equal numbers of blocks meet equal draws: a comparison of two contestants on
the same tokens is paired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RESAMPLES = 2000
SEED = 0

_ROWS = 64
"""Draws whose token weights exist at a time."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """The form that records have."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Estimate:
    """A statistic of the tokens, and the same statistic of every draw.

    Attributes:
        value: float64 scalar tensor.
        draws: `[draws]` float64.
    """

    value: Tensor
    draws: Tensor

    def interval(self) -> Interval:
        """The estimate with the 2.5th and 97.5th percentiles of its draws."""
        ends = self.draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return Interval(float(self.value), float(ends[0]), float(ends[1]))

    def exp(self) -> Estimate:
        """The exponential of the statistic."""
        return Estimate(self.value.exp(), self.draws.exp())

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: Estimate) -> Estimate:
        return Estimate(self.value / other.value, self.draws / other.draws)


@lru_cache(maxsize=8)
def block_counts(blocks: int) -> Tensor:
    """How often each draw takes each block: `[draws, blocks]` float64, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(blocks, (RESAMPLES, blocks), generator=generator)
    counts = torch.zeros(RESAMPLES, blocks, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def block_mean(means: Tensor, tokens: Tensor) -> Estimate:
    """Mean over tokens.

    Args:
        means: `[blocks]` float64, mean of each block.
        tokens: `[blocks]` tokens of each block.
    """
    weights = tokens.double()
    counts = block_counts(len(means))
    sums = means * weights
    return Estimate(sums.sum() / weights.sum(), (counts @ sums) / (counts @ weights))


def block_quantile(values: Tensor, block_of: Tensor, share: float) -> Estimate:
    """The smallest value that at least `share` of the tokens do not exceed.

    Args:
        values: `[tokens]`.
        block_of: `[tokens]` int64, the block each token is in; every block from 0 on has tokens.
        share: of the tokens, in (0, 1).
    """
    order = values.argsort()
    ranked, owner = values[order].double(), block_of[order]
    blocks = int(owner.max()) + 1

    def pick(weights: Tensor) -> Tensor:
        reached = weights[:, owner].cumsum(dim=1)
        need = (share * reached[:, -1:]).ceil().clamp_min(1)
        return ranked[torch.searchsorted(reached, need)[:, 0]]

    draws = torch.cat([pick(rows) for rows in torch.split(block_counts(blocks), _ROWS)])
    return Estimate(pick(torch.ones(1, blocks, dtype=torch.float64))[0], draws)


def block_slope(values: Tensor, steps: Tensor, block_of: Tensor) -> Estimate:
    """Least-squares slope of `values` by `steps`.

    Args:
        values: `[tokens]`.
        steps: `[tokens]`, not all equal.
        block_of: `[tokens]` int64, the block each token is in.
    """
    x, y = steps.double() - steps.double().mean(), values.double()
    blocks = int(block_of.max()) + 1
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y])
    sums = torch.zeros(5, blocks, dtype=torch.float64).index_add_(1, block_of, terms)

    def slope(total: Tensor) -> Tensor:
        n, sx, sy, sxx, sxy = total.unbind()
        return (n * sxy - sx * sy) / (n * sxx - sx * sx)

    return Estimate(slope(sums.sum(dim=1)), slope(sums @ block_counts(blocks).T))


def median_interval(values: list[float]) -> Interval:
    """Median with its distribution-free 95 % interval, the ends being order statistics.

    The ranks are those of the normal approximation to the binomial (Conover, *Practical
    Nonparametric Statistics*, section 3.2).
    """
    ranked = sorted(values)
    count = len(ranked)
    reach = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - reach))
    high = min(count - 1, math.ceil(count / 2 + reach))
    middle = (ranked[(count - 1) // 2] + ranked[count // 2]) / 2
    return Interval(middle, ranked[low], ranked[high])

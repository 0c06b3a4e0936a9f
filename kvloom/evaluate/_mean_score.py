"""95 % intervals of the mean score of independent cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvloom._ledger import Record
from kvloom.evaluate._bootstrap import Interval, block_mean

_Z = 1.959963984540054


def mean_score(scores: Sequence[float]) -> Record:
    """The mean with its interval, as records have it.

    Args:
        scores: one for each case, from 0 to 1, at least one.

    Returns:
        `value`, `low`, `high`, and `interval`: `wilson` if every score is 0 or 1, else `bootstrap` (over cases).
    """
    if all(score in (0, 1) for score in scores):
        return {**wilson(int(sum(scores)), len(scores)).as_dict(), "interval": "wilson"}
    means = torch.tensor(scores, dtype=torch.float64)
    return {**block_mean(means, torch.ones(len(scores))).interval().as_dict(), "interval": "bootstrap"}


def wilson(hits: int, trials: int) -> Interval:
    """A share and its score interval (Wilson 1927, *Probable inference, the law of succession*)."""
    share, weight = hits / trials, _Z**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    reach = _Z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    low, high = (centre - reach if hits else 0.0), (centre + reach if hits < trials else 1.0)
    return Interval(share, low, high)

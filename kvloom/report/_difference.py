"""Differences and means of scores that have intervals of their own.

Square-and-add: the reach of a sum is the root of its parts' squared reaches, those of paired parts with their
correlation (R. G. Newcombe, *Improved confidence intervals for the difference between binomial proportions based on
paired data*, Statistics in Medicine 17, 1998, method 10; for any means G. Y. Zou and A. Donner, Statistics in Medicine
27, 2008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from kvloom.report._values import Interval

Scores = dict[str, float]
"""Score from 0 to 1 by case."""


def difference(ours: Interval, theirs: Interval, our_cases: Scores, their_cases: Scores) -> Interval:
    """Ours less theirs, with its 95 % interval where both have theirs.

    Args:
        ours: a mean score.
        theirs: another one.
        our_cases: its cases, `{}` where they are not known.
        their_cases: theirs; the same cases are paired, others count as independent.
    """
    if ours.value is None or theirs.value is None:
        return Interval()
    value = ours.value - theirs.value
    if ours.bounds is None or theirs.bounds is None:
        return Interval(value)
    paired = bool(our_cases) and our_cases.keys() == their_cases.keys()
    phi = _correlation([(our_cases[case], their_cases[case]) for case in our_cases]) if paired else 0.0
    down = _reach(ours.value - ours.bounds[0], theirs.bounds[1] - theirs.value, phi)
    up = _reach(ours.bounds[1] - ours.value, theirs.value - theirs.bounds[0], phi)
    return Interval(value, value - down, value + up)


def mean(parts: Sequence[Interval]) -> Interval:
    """The mean of independent figures, with its 95 % interval where all have theirs; empty without any."""
    values = [part.value for part in parts]
    known = [value for value in values if value is not None]
    if not parts or len(known) != len(parts):
        return Interval()
    middle = fmean(known)
    ends = [part.bounds for part in parts]
    bounds = [end for end in ends if end is not None]
    if len(bounds) != len(parts):
        return Interval(middle)
    down = math.hypot(*(value - low for value, (low, _) in zip(known, bounds, strict=True))) / len(parts)
    up = math.hypot(*(high - value for value, (_, high) in zip(known, bounds, strict=True))) / len(parts)
    return Interval(middle, middle - down, middle + up)


def _reach(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 + other**2 - 2 * phi * one * other))


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation, a positive one lowered as in method 10, so that few cases pair less."""
    ours, theirs = (list(side) for side in zip(*pairs, strict=True))
    spread: float = pstdev(ours) * pstdev(theirs)
    if spread == 0:
        return 0.0
    middle = fmean(ours), fmean(theirs)
    covariance = fmean((a - middle[0]) * (b - middle[1]) for a, b in pairs)
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * len(pairs)))
    return covariance / spread

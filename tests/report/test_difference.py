"""Differences and means of scores, against the published method written with counts, and by their coverage."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.evaluate import mean_score
from kvloom.report._difference import difference, mean
from kvloom.report._values import Interval

Hits = list[int]


def of(hits: Hits) -> Interval:
    return Interval.of(mean_score(hits))


def cases(hits: Hits) -> dict[str, float]:
    return {str(n): float(hit) for n, hit in enumerate(hits)}


def newcombe(both: int, ours: int, theirs: int, neither: int) -> tuple[float, float]:
    """Method 10 by its definition, of a two-by-two table of pairs."""
    n = both + ours + theirs + neither
    first, second = (
        of([1] * (both + ours) + [0] * (n - both - ours)),
        of([1] * (both + theirs) + [0] * (n - both - theirs)),
    )
    margins = (both + ours) * (theirs + neither) * (both + theirs) * (ours + neither)
    product = both * neither - ours * theirs
    product = max(product - n / 2, 0) if product > 0 else product
    phi = product / math.sqrt(margins) if margins else 0.0
    assert first.bounds
    assert second.bounds
    p1, p2 = (both + ours) / n, (both + theirs) / n
    l1, u1, l2, u2 = p1 - first.bounds[0], first.bounds[1] - p1, p2 - second.bounds[0], second.bounds[1] - p2
    down = math.sqrt(max(0.0, l1**2 - 2 * phi * l1 * u2 + u2**2))
    up = math.sqrt(max(0.0, u1**2 - 2 * phi * u1 * l2 + l2**2))
    return p1 - p2 - down, p1 - p2 + up


@given(*[st.integers(0, 12)] * 4)
def test_shares_have_newcombes_interval(both: int, ours: int, theirs: int, neither: int) -> None:
    if both + ours + theirs + neither == 0:
        return
    first = [1] * both + [1] * ours + [0] * theirs + [0] * neither
    second = [1] * both + [0] * ours + [1] * theirs + [0] * neither
    found = difference(of(first), of(second), cases(first), cases(second))
    assert found.value == pytest.approx((ours - theirs) / len(first))
    assert found.bounds == pytest.approx(newcombe(both, ours, theirs, neither), abs=1e-9)


def test_intervals_of_paired_shares_cover_the_truth() -> None:
    rng, covered = random.Random(0), 0
    for _ in range(400):
        hard = [rng.random() for _ in range(30)]
        first, second = ([int(it < share) for it in hard] for share in (0.7, 0.55))
        flips = [int(hit ^ (rng.random() < 0.1)) for hit in second]
        truth = 0.7 - (0.55 * 0.9 + 0.45 * 0.1)
        low, high = difference(of(first), of(flips), cases(first), cases(flips)).bounds or (0, 0)
        covered += low <= truth <= high
    assert 0.93 <= covered / 400 <= 1.0


def test_pairs_tell_more_than_scores_alone() -> None:
    first = [1] * 30 + [0] * 10
    second = [1] * 25 + [0] * 15
    paired = difference(of(first), of(second), cases(first), cases(second)).bounds
    alone = difference(of(first), of(second), {}, {}).bounds
    other = difference(of(first), of(second), cases(first), {"of another task": 1.0}).bounds
    assert paired
    assert alone
    assert paired[0] > 0 > alone[0]
    assert other == alone


def test_what_is_not_known_is_left_out() -> None:
    assert difference(Interval(), Interval(0.5), {}, {}) == Interval()
    assert difference(Interval(0.25), Interval(0.5, 0.4, 0.6), {}, {}) == Interval(-0.25)
    assert mean([]) == Interval()
    assert mean([Interval(0.5), Interval()]) == Interval()
    assert mean([Interval(0.5), Interval(0.7, 0.6, 0.8)]) == Interval(pytest.approx(0.6))


def test_a_mean_reaches_as_far_as_the_root_of_its_parts() -> None:
    found = mean([Interval(0.5, 0.4, 0.6), Interval(0.7, 0.6, 0.9)])
    assert found.value == pytest.approx(0.6)
    assert found.bounds == pytest.approx((0.6 - math.hypot(0.1, 0.1) / 2, 0.6 + math.hypot(0.1, 0.2) / 2))

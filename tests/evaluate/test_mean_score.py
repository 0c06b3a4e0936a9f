"""Intervals of shares and of mean scores."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.evaluate._mean_score import mean_score, wilson


@given(st.integers(1, 400).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_the_ends_are_the_shares_that_a_score_test_just_rejects(counts):
    hits, trials = counts
    interval = wilson(hits, trials)
    assert interval.value == hits / trials
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    for end in (interval.low, interval.high):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / trials)
            assert abs(interval.value - end) / error == pytest.approx(1.959964, rel=1e-4)


def test_all_or_nothing_still_has_an_interval():
    assert wilson(5, 5).low == pytest.approx(0.5655, abs=1e-4)
    assert wilson(0, 5).high == pytest.approx(0.4345, abs=1e-4)


def test_shares_take_wilson_and_graded_scores_the_bootstrap():
    assert mean_score([1.0, 0.0, 1.0])["interval"] == "wilson"
    graded = mean_score([0.25, 0.5, 1.0, 0.0, 0.75])
    assert graded["interval"] == "bootstrap"
    assert graded["value"] == pytest.approx(0.5)
    assert 0 <= graded["low"] < 0.5 < graded["high"] <= 1
    assert mean_score([0.25, 0.5, 1.0, 0.0, 0.75]) == graded

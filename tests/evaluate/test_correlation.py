"""Correlations equal their definition on every draw of the pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvloom.errors import DataError
from kvloom.evaluate._bootstrap import block_counts
from kvloom.evaluate._correlation import pearson, spearman

VALUES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0, 7.0]), min_size=4, max_size=12)


def mean_ranks(values: list[float]) -> list[float]:
    return [sum(other < own for other in values) + (values.count(own) + 1) / 2 for own in values]


def plain(x: list[float], y: list[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - a) * (q - b) for p, q in zip(x, y, strict=True))
    spread = sum((p - a) ** 2 for p in x) * sum((q - b) ** 2 for q in y)
    return top / spread**0.5 if len(set(x)) > 1 and len(set(y)) > 1 else float("nan")


@given(VALUES, st.data())
def test_both_are_what_they_are_called_and_so_are_their_draws(x: list[float], data) -> None:
    y = data.draw(st.lists(st.integers(-5, 5).map(float), min_size=len(x), max_size=len(x)))
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    made = {pearson: lambda values: values, spearman: mean_ranks}
    for correlation, of in made.items():
        estimate = correlation(torch.tensor(x), torch.tensor(y))
        assert float(estimate.value) == pytest.approx(plain(of(x), of(y)), abs=1e-6)
        expected = []
        for counts in block_counts(len(x))[:20].long():
            drawn = [n for n, times in enumerate(counts.tolist()) for _ in range(times)]
            expected.append(plain(of([x[n] for n in drawn]), of([y[n] for n in drawn])))
        expected = [value for value in expected if value == value]
        assert estimate.draws[: len(expected)].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_rising_relation_has_rank_correlation_one_whatever_its_shape() -> None:
    x = torch.linspace(-1, 5, 40)
    interval = spearman(x, x.exp()).interval()
    assert (interval.value, interval.low, interval.high) == pytest.approx((1, 1, 1))
    assert pearson(x, x.exp()).interval().high < 0.95
    assert spearman(x, -x.exp()).interval().value == pytest.approx(-1)


def test_intervals_narrow_with_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator)
    y = x + torch.randn(400, generator=generator)
    few, many = (spearman(x[:n], y[:n]).interval() for n in (25, 400))
    assert few.high - few.low > 2 * (many.high - many.low)
    assert many.low < 0.69 < many.high


@pytest.mark.parametrize(("x", "y"), [([1.0, 2, 3], [1.0, 2, 4]), ([1.0] * 5, [1.0, 2, 3, 4, 5])])
def test_what_has_no_correlation_is_refused(x, y) -> None:
    for correlation in (pearson, spearman):
        with pytest.raises(DataError, match="give more plans"):
            correlation(torch.tensor(x), torch.tensor(y))

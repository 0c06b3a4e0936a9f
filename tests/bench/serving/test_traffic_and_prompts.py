from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench import Traffic, draw_prompts, make_traffic
from kvloom.errors import DataError, PlanError


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_prompts_are_pieces_of_the_text_from_different_places(size: int, count: int, length: int, seed: int):
    text = list(range(100, 100 + size))
    if size - length + 1 < count:
        with pytest.raises(DataError, match=f"{count} prompts of {length} tokens cannot begin at different places"):
            draw_prompts(text, count, length, seed)
        return
    drawn = draw_prompts(text, count, length, seed)
    assert drawn == draw_prompts(text, count, length, seed)
    assert len({prompt[0] for prompt in drawn}) == count
    assert all(prompt == list(range(prompt[0], prompt[0] + length)) for prompt in drawn)
    assert all(prompt[-1] in text for prompt in drawn)


def test_another_seed_draws_other_prompts():
    assert draw_prompts(range(1000), 5, 10, seed=0) != draw_prompts(range(1000), 5, 10, seed=1)


@pytest.mark.parametrize(("count", "length"), [(0, 4), (4, 0), (-1, 4)])
def test_no_prompts(count: int, length: int):
    with pytest.raises(DataError, match="give numbers above 0"):
        draw_prompts(range(100), count, length, 0)


def test_traffic_by_words():
    assert make_traffic("1, 8,8", "2,4.5,2.0") == (
        Traffic(concurrency=1),
        Traffic(concurrency=8),
        Traffic(rate=2.0),
        Traffic(rate=4.5),
    )
    assert [it.label for it in make_traffic("8", "2.5")] == ["8 at a time", "2.5 a second"]


@pytest.mark.parametrize(
    ("concurrency", "rate", "message"),
    [
        (None, None, "give --concurrency 8, or --rate 4"),
        ("0", None, "--concurrency: cannot read '0'"),
        ("1.5", None, "--concurrency: cannot read '1.5'"),
        ("8", "fast", "--rate: cannot read 'fast'"),
        (None, "-1", "--rate: cannot read '-1'"),
        (None, "nan", "--rate: cannot read 'nan'"),
        (None, "inf", "--rate: cannot read 'inf'"),
        ("1,", None, "--concurrency: cannot read ''"),
    ],
)
def test_traffic_that_cannot_be_read(concurrency: str | None, rate: str | None, message: str):
    with pytest.raises(PlanError, match=message):
        make_traffic(concurrency, rate)


def test_moments_are_of_the_seed_and_of_the_rate():
    moments = Traffic(rate=20.0).moments(4000, seed=1)
    assert moments == sorted(moments) == Traffic(rate=20.0).moments(4000, seed=1)
    assert moments != Traffic(rate=20.0).moments(4000, seed=2)
    assert moments[-1] == pytest.approx(4000 / 20, rel=0.05)
    gaps = [after - before for before, after in zip([0.0, *moments], moments, strict=False)]
    within_the_mean = sum(gap < 1 / 20 for gap in gaps) / len(gaps)
    assert within_the_mean == pytest.approx(1 - 2.718281828**-1, abs=0.03)  # exponential

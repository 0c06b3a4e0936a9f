from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.report import _format as fmt
from kvloom.report._values import Interval, number, numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0034, "0.0034"),
        (0.00342, "0.0034"),
        (1.07, "1.07"),
        (1.0, "1.00"),
        (0.2134, "0.213"),
        (0.06, "0.0600"),
        (0.00071, "0.00071"),
        (3.4e-6, "3.4e-06"),
        (11.84, "11.8"),
        (123.4, "123"),
        (0.0, "0"),
        (-0.5, "-0.500"),
        (2.5e6, "2.5e+06"),
        (math.inf, "inf"),
        (None, "–"),
    ],
)
def test_quantities_that_span_decades(value: float | None, text: str) -> None:
    assert fmt.format_small(value) == text


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_no_figure_loses_its_size(value: float) -> None:
    assert float(fmt.format_small(value)) == pytest.approx(value, rel=0.051)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (20_000, "19.5 KiB"),
        (7_372_800, "7.03 MiB"),
        (200 * 2**20, "200 MiB"),
        (3000 * 2**30, "3000 GiB"),
        (None, "–"),
    ],
)
def test_bytes(value: float | None, text: str) -> None:
    assert fmt.format_bytes(value) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (fmt.format_bits(3.614), "3.61"),
        (fmt.format_budget(3.5), "3.5"),
        (fmt.format_budget(2.5078125), "2.51"),
        (fmt.format_budget(16.0), "16"),
        (fmt.format_ppl(14.2), "14.20"),
        (fmt.format_ppl(686.94), "686.9"),
        (fmt.format_ppl(12345.6), "12,346"),
        (fmt.format_share(0.9341), "93.4 %"),
        (fmt.format_rate(33.42), "33.4"),
        (fmt.format_rate(1234.5), "1,234"),
        (fmt.format_count(16384.0), "16,384"),
        (fmt.format_times(3.139), "3.14×"),
        (fmt.format_times(12.3), "12×"),
        (fmt.join_words(["a"]), "a"),
        (fmt.join_words(["a", "b", "c"]), "a, b and c"),
        (fmt.join_words(list("abcdef")), "a, b, c and 3 more"),
    ],
)
def test_other_figures(written: str, text: str) -> None:
    assert written == text


@pytest.mark.parametrize("formatter", [fmt.format_bits, fmt.format_budget, fmt.format_ppl, fmt.format_share])
def test_nothing_is_a_dash(formatter: fmt.Formatter) -> None:
    assert formatter(None) == "–"


def test_intervals() -> None:
    assert fmt.format_interval(Interval(0.0034, 0.0031, 0.0037), fmt.format_small) == "0.0034 [0.0031, 0.0037]"
    assert fmt.format_interval(Interval(0.0034, None, 0.0037), fmt.format_small) == "0.0034"
    assert fmt.format_interval(Interval(0.0, 0.0, 0.0), fmt.format_small) == "0"
    assert fmt.format_interval(Interval(), fmt.format_small) == "–"


@pytest.mark.parametrize("value", [None, math.nan, True, "3", [3]])
def test_what_is_no_number_is_absent(value: object) -> None:
    assert number(value) is None
    assert numbers([value, 2]) == [None, 2.0]
    assert Interval.of({"value": value, "low": 1, "high": 2}) == Interval(None, 1.0, 2.0)
    assert Interval.of(value) == Interval()

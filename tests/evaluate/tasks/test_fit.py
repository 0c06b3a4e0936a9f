"""Prompts fill their length: one more unit of text would be too many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import DataError
from kvloom.evaluate.tasks.ruler._fit import Fitter

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=300)


@given(st.lists(SIZES, min_size=1, max_size=4), st.integers(0, 400), st.integers(0, 5))
def test_the_longest_prompt_that_fits_wherever_the_search_starts(prompts, room, least):
    fitter = Fitter("x", room)
    for sizes in prompts:

        def prompt(units, sizes=sizes):
            return [0] * sum(sizes[place % len(sizes)] for place in range(units))

        if len(prompt(least)) > room:
            with pytest.raises(
                DataError, match=rf"^x has at least {len(prompt(least))} tokens of prompt.*room for {room}"
            ):
                fitter.fill(prompt, least)
            continue
        made = fitter.fill(prompt, least)
        assert made == prompt(fitter.units)
        assert len(made) <= room < len(prompt(fitter.units + 1))
        assert fitter.units >= least


def test_a_second_prompt_is_found_near_the_first():
    tried = []

    def prompt(units):
        tried.append(units)
        return [0] * units

    fitter = Fitter("x", 10_000)
    fitter.fill(prompt, 1)
    tried.clear()
    fitter.fill(prompt, 1)
    assert tried == [10_000, 10_001]
    tried.clear()
    fitter.fill(lambda units: prompt(units) + [0] * 7, 1)
    assert tried == [10_000, 9_993, 9_994]

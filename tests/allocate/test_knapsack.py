from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvloom.allocate import _knapsack as knapsack
from kvloom.allocate._knapsack import Options, cheapest, greedy, solve

# Losses on a grid make ties common; free floats make sums inexact.
LOSSES = st.integers(-3, 12).map(float) | st.floats(0, 10, allow_subnormal=False)
OPTION = st.tuples(st.integers(0, 40), LOSSES)
UNIT = st.lists(OPTION, min_size=1, max_size=4)
UNITS = st.lists(UNIT, min_size=1, max_size=5)


def options(units):
    return [
        Options(np.array([c for c, _ in unit], dtype=np.int64), np.array([loss for _, loss in unit])) for unit in units
    ]


def every_total(units):
    for picks in itertools.product(*units):
        yield sum(cost for cost, _ in picks), math.fsum(loss for _, loss in picks)


@given(UNITS, st.integers(0, 200))
def test_the_optimum_is_that_of_brute_force(units, capacity):
    feasible = [loss for cost, loss in every_total(units) if cost <= capacity]
    if not feasible:
        with pytest.raises(ValueError, match="cheapest picks cost"):
            solve(options(units), capacity)
        return
    found = solve(options(units), capacity)
    assert found.cost <= capacity
    assert found.loss == pytest.approx(min(feasible), abs=1e-9)


@given(UNITS, st.data())
def test_a_capacity_met_to_the_byte_is_feasible(units, data):
    cost, loss = data.draw(st.sampled_from(list(every_total(units))))
    found = solve(options(units), cost)
    assert found.cost <= cost
    assert found.loss <= loss + 1e-9


@given(UNITS)
def test_the_smallest_capacity_works_and_one_byte_less_does_not(units):
    least = cheapest(options(units))
    assert least == min(cost for cost, _ in every_total(units))
    assert solve(options(units), least).cost == least
    with pytest.raises(ValueError, match="cheapest picks cost"):
        solve(options(units), least - 1)


@given(UNITS, st.integers(0, 200))
def test_the_picks_make_the_totals_and_the_bound_stays_below(units, capacity):
    given_options = options(units)
    capacity = max(capacity, cheapest(given_options))
    found = solve(given_options, capacity)
    chosen = [unit[pick] for unit, pick in zip(units, found.picks, strict=True)]
    assert found.cost == sum(cost for cost, _ in chosen)
    assert found.loss == pytest.approx(math.fsum(loss for _, loss in chosen), abs=1e-9)
    assert found.bound <= found.loss


@given(UNITS, st.integers(0, 200))
def test_among_equal_losses_the_cheapest_wins(units, capacity):
    grid = [[(cost, float(round(loss))) for cost, loss in unit] for unit in units]
    capacity = max(capacity, cheapest(options(grid)))
    totals = [total for total in every_total(grid) if total[0] <= capacity]
    best = min(totals, key=lambda total: (total[1], total[0]))
    found = solve(options(grid), capacity)
    assert (found.cost, found.loss) == best


def test_equal_options_are_settled_by_order():
    unit = Options(np.array([5, 5, 5]), np.array([1.0, 1.0, 1.0]))
    assert solve([unit, unit], 10).picks == (0, 0)


def test_the_bound_is_tight_on_the_convex_hull():
    """Where the relaxation has an integral optimum, the dual's value is that optimum."""
    unit = Options(np.array([0, 1, 2]), np.array([4.0, 2.0, 1.0]))
    found = solve([unit] * 3, 3)
    assert found.loss == 6.0
    assert found.bound == pytest.approx(6.0, abs=1e-9)


def test_the_bound_is_the_relaxations_value_where_a_gap_remains():
    """One unit, capacity half way between its options: the relaxation mixes them half and half."""
    unit = Options(np.array([0, 10]), np.array([8.0, 0.0]))
    found = solve([unit], 5)
    assert found.loss == 8.0
    assert found.bound == pytest.approx(4.0, abs=1e-9)


def test_many_units_whose_costs_share_no_divisor():
    """Big coprime costs, where a table over all capacities would need terabytes."""
    rng = np.random.default_rng(3)
    units = [Options(rng.integers(1, 10**9, 12), rng.random(12) * rng.lognormal(0, 2)) for _ in range(60)]
    capacity = cheapest(units) + 10**9
    found = solve(units, capacity)
    assert found.cost <= capacity
    assert found.bound <= found.loss <= found.bound * 1.05


@given(UNITS, st.integers(0, 200), st.integers(0, 30))
@example([[(0, 0.0), (2, -1.0)]], 1, 0)
def test_a_search_that_is_cut_short_ends_with_feasible_picks_and_a_true_gap(units, capacity, work):
    capacity = max(capacity, cheapest(options(units)))
    least = min(loss for cost, loss in every_total(units) if cost <= capacity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_WORK", work)
        found = solve(options(units), capacity)
    chosen = [unit[pick] for unit, pick in zip(units, found.picks, strict=True)]
    assert found.cost == sum(cost for cost, _ in chosen) <= capacity
    assert found.loss == pytest.approx(math.fsum(loss for _, loss in chosen), abs=1e-9)
    assert found.lower_bound <= least + 1e-9
    assert found.gap >= 0
    if found.loss > 1e-6:
        assert found.loss * (1 - found.gap) <= least + 1e-9
    if found.is_optimal:
        assert found.gap == 0
        assert found.loss == pytest.approx(least, abs=1e-9)


@given(UNITS, st.integers(0, 200))
def test_greedy_fits_and_is_no_better_than_the_optimum(units, capacity):
    given_options = options(units)
    capacity = max(capacity, cheapest(given_options))
    chosen = [unit[pick] for unit, pick in zip(units, greedy(given_options, capacity), strict=True)]
    assert sum(cost for cost, _ in chosen) <= capacity
    assert math.fsum(loss for _, loss in chosen) >= solve(given_options, capacity).loss - 1e-9


def test_ten_thousand_units_are_close_to_the_bound():
    rng = np.random.default_rng(0)
    units = [Options(64 * rng.integers(1, 200, 12), rng.random(12) * rng.lognormal(0, 2)) for _ in range(10_000)]
    capacity = 2 * cheapest(units)
    found = solve(units, capacity)
    assert found.cost <= capacity
    assert found.gap <= 0.005
    assert found.bound >= 0.995 * found.loss

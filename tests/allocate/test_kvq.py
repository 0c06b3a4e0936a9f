"""KVQ's rules: the published patterns, and plans under a budget of true bytes."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import channel, profile, token

from kvloom.allocate import KVQ, Budget, allocate
from kvloom.errors import PlanError
from kvloom.plan import spend_bits

TOKENS = 2048

# Frobenius norms of the projections of Llama-3.1-8B, rounded (`assets/frobenius_norm` of mohsenhariri/spectral-kv).
LLAMA_KEYS = """
    55.45 56.43 57.65 57.50 56.70 56.87 56.88 57.36 56.45 56.17 56.87 56.29 54.90 56.47 55.96 54.95 55.54 55.53 56.88
    54.48 53.68 54.06 52.73 52.48 49.97 49.82 51.23 50.58 48.17 50.48 44.01 48.66
"""
LLAMA_VALUES = """
    14.86 18.38 15.20 17.90 19.20 16.04 17.38 17.16 18.09 20.96 18.12 17.80 20.86 19.43 19.24 20.97 19.78 21.70 19.80
    20.90 22.00 22.65 23.87 25.13 27.42 27.55 28.75 30.74 31.79 32.94 39.14 34.56
"""
LLAMA = [float(norm) for pair in zip(LLAMA_KEYS.split(), LLAMA_VALUES.split(), strict=True) for norm in pair]


def bits_of(plan):
    specs = [plan.spec(i) for i in plan.model.packed_layers]
    return [spec.key.bits for spec in specs], [spec.value.bits for spec in specs]


@pytest.mark.parametrize(
    ("budget", "widths", "key", "value"),
    [
        (2, (1, 1.58, 2, 4, 6, 8), 2.56, 1.44),
        (3, (1, 1.58, 2, 4, 6, 8), 4, 2),
        (4, (1, 1.58, 2, 4, 6, 8), 4, 4),
        (4, (2, 4, 8), 4, 4),
    ],
)
def test_the_published_norms_buy_the_published_patterns(budget, widths, key, value):
    bits = spend_bits(LLAMA, 64 * budget, widths)
    assert statistics.fmean(bits[::2]) == pytest.approx(key, abs=0.005)
    assert statistics.fmean(bits[1::2]) == pytest.approx(value, abs=0.005)


@pytest.mark.parametrize(("bits", "pattern"), [(3, (4, 2)), (4, (4, 4))])
def test_more_for_keys_less_for_values_on_a_profiles_formats(bits, pattern):
    """Code bits 3 and 4; scales and zero points of groups of 64 make 0.5 true bits more."""
    measured = profile(32, keys=[channel(b) for b in (2, 4, 8)], values=[token(b) for b in (2, 4, 8)])
    plan = allocate(measured, Budget.bits(bits + 0.5, TOKENS), method=KVQ(LLAMA))
    assert bits_of(plan) == ([pattern[0]] * 32, [pattern[1]] * 32)


@given(st.floats(2.3, 8), st.integers(0, 5))
def test_the_budget_holds_and_one_bit_more_does_not_fit(bits, seed):
    measured = profile(6, seed=seed)
    budget = Budget.bits(bits, TOKENS)
    plan = allocate(measured, budget, method="kvq")
    key_bits, value_bits = bits_of(plan)
    assert plan.nbytes(1, TOKENS) <= budget.total(measured.model)
    spare = budget.total(measured.model) - plan.nbytes(1, TOKENS)
    if max(key_bits + value_bits) < 8 and set(key_bits + value_bits) <= {1, 2, 3, 4, 5}:
        assert spare < 2 * TOKENS * 3 * 64 / 8  # of one tensor, whose next width may be two bits away
    assert {plan.spec(i).key.grouping for i in range(6)} == {"per_channel"}
    assert {plan.spec(i).key.group_size for i in range(6)} == {64}


def test_norms_come_from_the_table():
    """Losses c**2 * 4**-b give the plan that the norms c give."""
    keys, values = [channel(b) for b in (2, 3, 4, 8)], [token(b) for b in (2, 3, 4, 8)]
    measured = profile(32, keys=keys, values=values)
    table = measured.table.model_copy(
        update={
            "key_loss": [[norm**2 * 4.0**-spec.bits for spec in keys] for norm in LLAMA[::2]],
            "value_loss": [[norm**2 * 4.0**-spec.bits for spec in values] for norm in LLAMA[1::2]],
        }
    )
    implied = allocate(measured.model_copy(update={"table": table}), Budget.bits(3.3, TOKENS), method="kvq")
    given_norms = allocate(measured, Budget.bits(3.3, TOKENS), method=KVQ(LLAMA))
    assert bits_of(implied) == bits_of(given_norms)


def test_groups_are_bought_by_norms_too():
    keys = [channel(b, group) for group in (32, 64, 128) for b in (2, 4)]
    values = [token(b, group) for group in (32, 64) for b in (2, 4)]
    measured = profile(4, keys=keys, values=values)
    norms = [60.0, 1.0] * 4
    plan = allocate(measured, Budget.bits(4.5, TOKENS), method=KVQ(norms, group_budget=128 / 3))
    assert {plan.spec(i).key.group_size for i in range(4)} == {32}
    assert {plan.spec(i).value.group_size for i in range(4)} == {64}


def test_a_value_group_of_the_whole_head_is_a_size_like_others():
    measured = profile(2, keys=[channel(2), channel(2, 32)], values=[token(2), token(2, 32)])
    plan = allocate(measured, Budget.bits(4, TOKENS), method=KVQ(group_budget=64))
    assert (plan.spec(0).key.group_size, plan.spec(0).value.group_size) == (64, "head_dim")


def test_groups_are_bought_where_one_side_has_more_widths():
    """Norms are those that a width of both sides implies."""
    measured = profile(2, keys=[channel(b, 32) for b in (1, 2, 4)], values=[token(b, 32) for b in (2, 4)])
    plan = allocate(measured, Budget.bits(6, TOKENS), method=KVQ(group_budget=32))
    assert bits_of(plan) == ([4, 4], [4, 4])


@pytest.mark.parametrize(
    ("keys", "values", "method", "bits", "why"),
    [
        ([channel(2)], [token(4)], KVQ(), 8, "share no bits"),
        ([channel(2, 32)], [token(2)], KVQ(group_budget=64), 8, "share no group size"),
        ([channel(2)], [token(2)], KVQ([1.0]), 8, "norms has 1 numbers: give two for each of 4 layers"),
        ([channel(2), channel(1)], [token(2), token(4)], KVQ(), 2.1, "2 bits everywhere takes"),
    ],
)
def test_what_the_rule_cannot_do_is_said(keys, values, method, bits, why):
    with pytest.raises(PlanError, match=why):
        allocate(profile(keys=keys, values=values), Budget.bits(bits, TOKENS), method=method)

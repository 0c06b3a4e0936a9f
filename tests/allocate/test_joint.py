"""The joint optimum of tokens and bits is the best of all plans, within true bytes."""

from __future__ import annotations

import itertools

import pytest
from evictions import with_evictions
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import channel, profile, token

from kvloom.allocate import Budget, Exact, Joint, allocate
from kvloom.errors import PlanError
from kvloom.plan import Plan, Window

KEYS = (channel(2), channel(4), channel(16))
VALUES = (token(2), token(4))
LONG = (channel(2, 128), channel(4))
MEASURED = with_evictions(profile(2, keys=KEYS, values=VALUES))


def kept(candidate, tokens, page_tokens=64, sinks=4):
    """The candidate's tokens at a length: sinks and the nearest number of whole pages."""
    return sinks + page_tokens * max(0, round((candidate.budget * tokens - sinks) / page_tokens))


def every_choice(measured, tokens, row):
    """(evict, key, value, loss) of all that a layer may do; sinks are 4."""
    table, eviction = measured.table, measured.eviction
    for k, v in itertools.product(range(len(table.key_specs)), range(len(table.value_specs))):
        key, value = table.key_specs[k], table.value_specs[v]
        bits = table.key_loss[row][k] + table.value_loss[row][v]
        yield None, key, value, bits
        page = max(64, *(spec.group_size for spec in (key, value) if spec.group_size != "head_dim" and spec.bits < 16))
        for candidate, loss in zip(eviction.candidates, eviction.loss[row], strict=True):
            budget = kept(candidate, tokens, page)
            least = 4 + candidate.make_policy().newest(budget)
            if least <= budget < tokens:
                yield candidate.model_copy(update={"budget": budget}), key, value, bits + loss


def brute_force(measured, budget):
    """The least loss of any plan within the budget."""
    layers = measured.table.layers
    best = None
    for picks in itertools.product(*(list(every_choice(measured, budget.tokens, n)) for n in range(len(layers)))):
        loss = sum(pick[3] for pick in picks)
        if best is not None and loss >= best:
            continue
        specs = {layer: pick[1:3] for layer, pick in zip(layers, picks, strict=True)}
        evict = {layer: pick[0] for layer, pick in zip(layers, picks, strict=True)}
        plan = Plan.from_specs(measured.model, specs, window=Window(sinks=4), evict=evict)
        if plan.nbytes(budget.batch, budget.tokens, budget.dtype) <= budget.total(measured.model):
            best = loss
    return best


@pytest.mark.parametrize("bits", [0.9, 1.5, 3.0])
def test_no_plan_loses_less(bits):
    measured = with_evictions(profile(2, keys=KEYS[:2], values=VALUES), ("snapkv",))
    budget = Budget.bits(bits, 1024)
    plan = allocate(measured, budget, method="joint")
    assert plan.provenance.predicted_loss == pytest.approx(brute_force(measured, budget))


def test_no_plan_loses_less_where_pages_differ():
    measured = with_evictions(profile(2, keys=LONG, values=VALUES[:1]), ("snapkv",))
    budget = Budget.bits(1.2, 1500)
    plan = allocate(measured, budget, method="joint")
    assert plan.provenance.predicted_loss == pytest.approx(brute_force(measured, budget))


@settings(max_examples=25)
@given(
    st.floats(3, 20),
    st.integers(700, 70_000),
    st.integers(1, 4),
    st.sampled_from([None, "float32"]),
    st.sampled_from([Window(sinks=4), Window(), Window(sinks=4, recent=40), Window(sinks=2, recent_ratio=0.1)]),
)
def test_the_certificate_has_the_plans_true_bytes(bits, tokens, batch, dtype, window):
    measured = with_evictions(profile(3, keys=KEYS, values=VALUES), window=window)
    nbytes = Budget.bits(bits, tokens).total(measured.model) * batch
    budget = Budget.memory(nbytes, batch, tokens, dtype)
    plan = allocate(measured, budget, method="joint")
    assert plan.nbytes(batch, tokens, dtype) == plan.provenance.certificate["used_bytes"] <= nbytes


def test_kept_tokens_fill_pages():
    plan = allocate(MEASURED, Budget.bits(1, 2048), method="joint")
    evicting = [plan.spec(layer).evict for layer in (0, 1) if plan.spec(layer).evict]
    assert evicting
    assert all((evict.budget - 4) % 64 == 0 for evict in evicting)


def test_eviction_beats_bits_alone_where_bytes_are_few_and_room_for_all_keeps_all():
    few = Budget.bits(3.2, 2048)
    alone = allocate(MEASURED, few, method="exact").provenance.predicted_loss
    assert allocate(MEASURED, few, method="joint").provenance.predicted_loss <= alone
    plenty = allocate(MEASURED, Budget.bits(40, 2048), method="joint")
    assert all(plenty.spec(layer).evict is None for layer in (0, 1))


def test_below_the_smallest_plan_of_bits_alone_tokens_leave():
    budget = Budget.bits(1.2, 2048)
    with pytest.raises(PlanError, match="smallest plan"):
        allocate(MEASURED, budget, method=Exact())
    plan = allocate(MEASURED, budget, method="joint")
    assert plan.true_bits(2048) <= 1.2


def test_one_policy_for_all():
    budget = Budget.bits(1.5, 2048)
    best = allocate(MEASURED, budget, method=Joint())
    for policy in ("snapkv", "expected_attention"):
        plan = allocate(MEASURED, budget, method=Joint(policy))
        assert {plan.spec(layer).evict.policy for layer in (0, 1) if plan.spec(layer).evict} <= {policy}
        assert plan.provenance.predicted_loss >= best.provenance.predicted_loss


@pytest.mark.parametrize(
    ("measured", "policy", "message"),
    [
        (profile(2), "auto", "kvloom profile MODEL --evict auto"),
        (MEASURED, "h2o", "has no losses of policy 'h2o'.*profile with --evict h2o"),
    ],
)
def test_what_was_not_measured_is_named(measured, policy, message):
    with pytest.raises(PlanError, match=message):
        allocate(measured, Budget.bits(2, 2048), method=Joint(policy))


def test_a_budget_is_needed_and_must_be_large_enough():
    with pytest.raises(PlanError, match="method 'joint' needs one"):
        allocate(MEASURED, None, method="joint")
    with pytest.raises(PlanError, match=r"takes .* bytes .* raise the budget"):
        allocate(MEASURED, Budget.bits(0.01, 2048), method="joint")


def test_a_prompt_that_reads_packed_tokens_cannot_evict():
    with pytest.raises(PlanError, match='set prefill to "exact"'):
        allocate(MEASURED, Budget.bits(1, 2048), method="joint", prefill="quantized")

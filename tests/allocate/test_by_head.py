"""Plans whose KV heads decide by themselves, beside every plan there is and beside plans by layer."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import KEYS, VALUES, channel, profile, token

from kvloom.allocate import Budget, Constraints, Exact, ExactFront, Greedy, allocate, parse_pairs
from kvloom.allocate._units import specs_of, units_of
from kvloom.errors import PlanError
from kvloom.plan import Plan, Window

TOKENS = 2048
BY_HEAD = Exact(by_head=True)
FEW_KEYS = (channel(2), channel(4))
FEW_VALUES = (token(2), token(8))


def by_heads(layers=4, heads=3, seed=0, keys=KEYS, values=VALUES):
    """A profile whose heads share their layer's losses at random."""
    measured = profile(layers, seed=seed, keys=keys, values=values, heads=heads)
    table, rng = measured.table, random.Random(seed)

    def shared(losses):
        parts = [[rng.lognormvariate(0, 1.5) for _ in range(heads)] for _ in losses]
        return [[[own * x / sum(part) for x in row] for own in part] for part, row in zip(parts, losses, strict=True)]

    told = {"key_head_loss": shared(table.key_loss), "value_head_loss": shared(table.value_loss)}
    return measured.model_copy(update={"table": type(table).model_validate({**dict(table), **told})})


def heads_of(plan):
    """(key, value) specs of each head by layer."""
    heads = range(plan.model.num_kv_heads)
    return {i: [plan.spec(i).head(h) for h in heads] for i in plan.model.packed_layers}


def loss_of(table, specs):
    """Predicted loss of (key, value) specs of each head by layer."""
    return sum(
        table.key_head_loss[row][head][table.key_specs.index(key)]
        + table.value_head_loss[row][head][table.value_specs.index(value)]
        for row, layer in enumerate(table.layers)
        for head, (key, value) in enumerate(specs[layer])
    )


def every_choice(table):
    pairs = list(itertools.product(table.key_specs, table.value_specs))
    heads = table.model.num_kv_heads
    for picks in itertools.product(pairs, repeat=len(table.layers) * heads):
        yield {layer: list(picks[n * heads : (n + 1) * heads]) for n, layer in enumerate(table.layers)}


def keeps_to(specs, constraints):
    layers = sorted(specs)
    bits = {layer: [(key.bits, value.bits) for key, value in own] for layer, own in specs.items()}
    blocks = [layers[n : n + constraints.equal_in] for n in range(0, len(layers), constraints.equal_in)]
    pairs = [pair for own in bits.values() for pair in own]
    return (
        all(bits[layer] == bits[block[0]] for block in blocks for layer in block)
        and (constraints.pairs is None or set(pairs) <= constraints.pairs)
        and (
            constraints.max_layouts is None
            or len({own for each in specs.values() for own in each}) <= constraints.max_layouts
        )
        and all(min(min(pair) for pair in bits[layer]) >= least for layer, least in constraints.protect.items())
    )


@pytest.mark.parametrize("share", [0.0, 0.15, 0.4, 0.8, 1.0])
def test_no_plan_of_all_plans_within_the_budget_is_better(share):
    measured = by_heads(2, heads=2, seed=3, keys=FEW_KEYS, values=FEW_VALUES)
    choices = list(every_choice(measured.table))
    sizes = [Plan.from_head_specs(measured.model, own).nbytes(1, TOKENS) for own in choices]
    capacity = int(min(sizes) + share * (max(sizes) - min(sizes)))
    plan = allocate(measured, Budget.memory(capacity, 1, TOKENS), method=BY_HEAD, window=Window())
    best = min(loss_of(measured.table, own) for own, n in zip(choices, sizes, strict=True) if n <= capacity)
    assert plan.nbytes(1, TOKENS) <= capacity
    assert loss_of(measured.table, heads_of(plan)) == pytest.approx(best, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.floats(2.3, 9), st.integers(1, 4), st.integers(0, 5), st.sampled_from([Window(), Window(sinks=4, recent=32)]))
def test_never_worse_than_by_layer_at_its_own_bytes(bits, heads, seed, window):
    measured = by_heads(4, heads=heads, seed=seed)
    layers = allocate(measured, Budget.bits(bits, TOKENS), window=window)
    budget = Budget.memory(layers.nbytes(2, TOKENS), 2, TOKENS)
    plan = allocate(measured, budget, method=BY_HEAD, window=window)
    proof = plan.provenance.certificate
    assert proof["units"] == 4 * heads * 2
    assert proof["used_bytes"] == plan.nbytes(2, TOKENS) <= proof["capacity_bytes"] == layers.nbytes(2, TOKENS)
    assert proof["optimum"] == pytest.approx(loss_of(measured.table, heads_of(plan)), rel=1e-12)
    assert proof["gap"] == 0.0
    assert proof["optimum"] <= layers.provenance.predicted_loss * (1 + 1e-9)
    if heads == 1:
        assert heads_of(plan) == heads_of(layers)


def test_heads_that_differ_are_worth_telling_apart():
    measured = by_heads(6)
    layers, plan = (allocate(measured, Budget.bits(3, TOKENS), method=how) for how in (Exact(), BY_HEAD))
    assert plan.provenance.predicted_loss < 0.9 * layers.provenance.predicted_loss
    assert any(entry.heads for entry in plan.layers)
    assert not any(entry.heads for entry in layers.layers)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 3), st.sampled_from([500, 2048]), st.sampled_from([None, "float32"]))
def test_costs_of_the_units_are_the_bytes_of_the_plan(data, batch, tokens, dtype):
    outliers = channel(3).model_copy(update={"outliers": 0.01})
    measured = by_heads(2, heads=3, keys=(*FEW_KEYS, outliers, channel(16)), values=(*FEW_VALUES, token(3, 32)))
    budget, window = Budget.memory(10**9, batch, tokens, dtype), Window(sinks=4, recent_ratio=0.1)
    units = units_of(measured.table, budget, window, by_head=True)
    picks = [data.draw(st.integers(0, len(unit.choices) - 1)) for unit in units]
    plan = Plan.from_head_specs(measured.model, specs_of(units, picks, 3), window=window)
    costs = [int(unit.options.cost[pick]) for unit, pick in zip(units, picks, strict=True)]
    assert sum(costs) == plan.nbytes(batch, tokens, dtype)


@settings(deadline=None, max_examples=25)
@given(
    st.builds(
        Constraints,
        equal_in=st.sampled_from([1, 2]),
        pairs=st.none() | st.frozensets(st.sampled_from([(2, 2), (4, 2), (4, 8)]), min_size=1),
        max_layouts=st.none() | st.integers(1, 3),
        protect=st.dictionaries(st.integers(0, 1), st.sampled_from([2, 3]), max_size=1),
    ),
    st.sampled_from([0.0, 0.3, 0.6]),
    st.integers(0, 2),
)
def test_no_plan_that_keeps_to_the_constraints_is_better(constraints, share, seed):
    pytest.importorskip("scipy")
    measured = by_heads(2, heads=2, seed=seed, keys=FEW_KEYS, values=FEW_VALUES)
    kept = [own for own in every_choice(measured.table) if keeps_to(own, constraints)]
    if not kept:
        with pytest.raises(PlanError, match=r"no plan of|no candidate has so many"):
            allocate(measured, Budget.bits(16, TOKENS), method=Exact(constraints, by_head=True))
        return
    sizes = [Plan.from_head_specs(measured.model, own).nbytes(1, TOKENS) for own in kept]
    capacity = int(min(sizes) + share * (max(sizes) - min(sizes)))
    plan = allocate(measured, Budget.memory(capacity, 1, TOKENS), method=Exact(constraints, by_head=True))
    best = min(loss_of(measured.table, own) for own, n in zip(kept, sizes, strict=True) if n <= capacity)
    assert keeps_to(heads_of(plan), constraints)
    assert plan.nbytes(1, TOKENS) <= capacity
    assert loss_of(measured.table, heads_of(plan)) == pytest.approx(best, rel=1e-6)


def test_greedy_knows_heads_and_does_not_beat_the_optimum():
    measured, budget = by_heads(6), Budget.bits(3.3, TOKENS)
    plan, best = (allocate(measured, budget, method=how) for how in (Greedy(by_head=True), BY_HEAD))
    assert any(entry.heads for entry in plan.layers)
    assert plan.nbytes(1, TOKENS) <= budget.total(measured.model)
    assert plan.provenance.predicted_loss == pytest.approx(loss_of(measured.table, heads_of(plan)), rel=1e-12)
    assert best.provenance.predicted_loss <= plan.provenance.predicted_loss


def test_a_front_by_head():
    front = ExactFront(by_heads(3), TOKENS, by_head=True)
    plans = front.plans(6)
    assert front.nbytes(plans[0]) == front.least
    assert any(entry.heads for plan in plans for entry in plan.layers)


def test_the_plan_survives_its_file(tmp_path):
    plan = allocate(by_heads(6), Budget.bits(3, TOKENS), method=BY_HEAD)
    plan.save(tmp_path / "kv_plan.json")
    again = Plan.load(tmp_path / "kv_plan.json")
    assert again == plan
    assert heads_of(again) == heads_of(plan)


def test_a_profile_of_ninety_heads_keeps_to_pairs():
    pytest.importorskip("scipy")
    only = Constraints(pairs=parse_pairs("K4V4,K4V2,K2V2"), protect={0: 4})
    measured = by_heads(30)
    budget = Budget.bits(3.3, TOKENS)
    plan = allocate(measured, budget, method=Exact(only, by_head=True))
    assert keeps_to(heads_of(plan), only)
    assert plan.nbytes(1, TOKENS) <= budget.total(measured.model)
    assert plan.provenance.certificate["gap"] <= 0.01


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: profile(2), "signal 'error_gradient' does not tell KV heads apart"),
        (lambda: by_heads(2, keys=(channel(2), channel(2, 128))), "pages of different lengths"),
        (
            lambda: by_heads(2, keys=(channel(2), channel(3).model_copy(update={"codec": "nuq", "codebook": None}))),
            "candidate 3b/ch64/nuq has a codebook",
        ),
    ],
)
@pytest.mark.parametrize("how", [BY_HEAD, Greedy(by_head=True)], ids=["exact", "greedy"])
def test_where_heads_cannot_decide_it_is_one_sentence(make, why, how):
    with pytest.raises(PlanError, match=why):
        allocate(make(), Budget.bits(4, TOKENS), method=how)

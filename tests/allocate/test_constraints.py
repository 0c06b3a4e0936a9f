"""Plans under side constraints, beside every plan there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import channel, fingerprint, profile, token

from kvloom import _extras
from kvloom.allocate import Budget, Constraints, Exact, allocate, parse_pairs, parse_protect
from kvloom.errors import MissingExtraError, PlanError
from kvloom.plan import Plan

pytest.importorskip("scipy")

TOKENS = 2048
KEYS = (channel(2), channel(4), channel(4, 32))
VALUES = (token(2), token(4), token(8))
LONG_KEYS = (channel(2), channel(2, 128), channel(4))

CONSTRAINTS = st.builds(
    Constraints,
    equal_in=st.sampled_from([1, 2, 3]),
    pairs=st.none() | st.frozensets(st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4, 8])), min_size=1),
    max_layouts=st.none() | st.integers(1, 3),
    protect=st.dictionaries(st.integers(0, 2), st.sampled_from([2, 4, 5]), max_size=2),
)


def specs_of(plan):
    return {i: (plan.spec(i).key, plan.spec(i).value) for i in plan.model.packed_layers}


def keeps_to(specs, constraints):
    layers = sorted(specs)
    blocks = [layers[n : n + constraints.equal_in] for n in range(0, len(layers), constraints.equal_in)]
    widths = {layer: (key.bits, value.bits) for layer, (key, value) in specs.items()}
    return (
        all(len({widths[layer] for layer in block}) == 1 for block in blocks)
        and (constraints.pairs is None or set(widths.values()) <= constraints.pairs)
        and (constraints.max_layouts is None or len(set(specs.values())) <= constraints.max_layouts)
        and all(min(widths[layer]) >= bits for layer, bits in constraints.protect.items())
    )


def every_choice(table):
    pairs = list(itertools.product(table.key_specs, table.value_specs))
    for picks in itertools.product(pairs, repeat=len(table.layers)):
        yield dict(zip(table.layers, picks, strict=True))


@settings(max_examples=25)
@given(CONSTRAINTS, st.sampled_from([KEYS, LONG_KEYS]), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(0, 2))
def test_no_plan_that_keeps_to_the_constraints_is_better(constraints, keys, share, seed):
    measured = profile(3, seed=seed, keys=keys, values=VALUES)
    table = measured.table
    kept = [own for own in every_choice(table) if keeps_to(own, constraints)]
    sizes = [Plan.from_specs(measured.model, own).nbytes(1, TOKENS) for own in kept]
    capacity = int(min(sizes) + share * (max(sizes) - min(sizes))) if kept else 10**9
    budget = Budget.memory(capacity, 1, TOKENS)
    if not kept:
        with pytest.raises(PlanError, match=r"no plan of|no candidate has so many"):
            allocate(measured, budget, method=Exact(constraints))
        return
    plan = allocate(measured, budget, method=Exact(constraints))
    best = min(table.predicted_loss(own) for own, size in zip(kept, sizes, strict=True) if size <= capacity)
    assert keeps_to(specs_of(plan), constraints)
    assert plan.nbytes(1, TOKENS) <= capacity
    assert table.predicted_loss(specs_of(plan)) == pytest.approx(best, rel=1e-6)
    proof = plan.provenance.certificate
    assert proof["lower_bound"] <= proof["optimum"] * (1 + 1e-12)
    assert proof["lagrangian_bound"] <= proof["optimum"]
    assert proof["gap"] <= 1e-6


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(equal_in=4),
        Constraints(pairs=parse_pairs("K4V4,K4V2,K2V2")),
        Constraints(protect={0: 8, 29: 8}),
        Constraints(max_layouts=4),
    ],
    ids=str,
)
def test_thirty_layers_keep_to_each(constraints):
    measured = profile(30)
    budget = Budget.bits(3.5, TOKENS)
    plan = allocate(measured, budget, method=Exact(constraints))
    free = allocate(measured, budget)
    assert keeps_to(specs_of(plan), constraints)
    assert plan.nbytes(1, TOKENS) <= budget.total(measured.model)
    assert free.provenance.predicted_loss <= plan.provenance.predicted_loss
    proof = plan.provenance.certificate
    assert proof["constraints"] == str(constraints)
    assert proof["gap"] <= 0.01
    assert proof["optimum"] == plan.provenance.predicted_loss
    assert proof["used_bytes"] == plan.nbytes(1, TOKENS)


def test_no_constraints_are_the_exact_plan():
    measured = profile(4)
    budget = Budget.bits(3.5, TOKENS)
    plain, bare = allocate(measured, budget), allocate(measured, budget, method=Exact(Constraints()))
    assert specs_of(plain) == specs_of(bare)
    assert "constraints" not in bare.provenance.certificate


def test_blocks_and_layers_are_those_that_are_packed():
    measured = profile(4)
    model = fingerprint(4).model_copy(update={"num_layers": 9, "packed_layers": (1, 2, 5, 8)})
    table = measured.table.model_copy(update={"model": model, "layers": [1, 2, 5, 8]})
    hybrid = measured.model_copy(update={"model": model, "table": table})
    specs = specs_of(allocate(hybrid, Budget.bits(4, TOKENS), method=Exact(Constraints(equal_in=2, protect={8: 5}))))
    assert (specs[1][0].bits, specs[5][1].bits) == (specs[2][0].bits, specs[8][1].bits)
    assert min(spec.bits for spec in specs[8]) >= 5
    with pytest.raises(PlanError, match="protect names layer 3, which is not one of the packed layers"):
        allocate(hybrid, Budget.bits(4, TOKENS), method=Exact(Constraints(protect={3: 4})))


def test_too_small_a_budget_is_told_the_least():
    measured = profile(4)
    constraints = Constraints(protect={0: 8})
    with pytest.raises(PlanError, match="the smallest plan with protect 0:8 takes") as caught:
        allocate(measured, Budget.bits(1.6, TOKENS), method=Exact(constraints))
    least = int(str(caught.value).split("takes ")[1].split(" ")[0])
    plan = allocate(measured, Budget.memory(least, 1, TOKENS), method=Exact(constraints))
    assert plan.nbytes(1, TOKENS) == least
    with pytest.raises(PlanError, match="the smallest plan with"):
        allocate(measured, Budget.memory(least - 1, 1, TOKENS), method=Exact(constraints))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Constraints(equal_in=0), "equal_in is 0"),
        (lambda: Constraints(max_layouts=0), "max_layouts is 0"),
        (lambda: Constraints(pairs=frozenset()), "pairs is empty"),
        (lambda: parse_pairs("K4V4,4/2"), "cannot read the pairs"),
        (lambda: parse_protect(["0-1"]), "cannot read '0-1'"),
        (lambda: parse_protect(["a:4"]), "cannot read 'a:4'"),
        (lambda: parse_protect(["0-3:4", "3:8"]), "layer 3 is protected twice"),
    ],
)
def test_senseless_constraints_name_the_field(make, why):
    with pytest.raises(PlanError, match=why):
        make()


def test_constraints_are_read():
    assert parse_pairs("K4V4, k4v2") == {(4, 4), (4, 2)}
    assert parse_protect(["0-1,29:8", "5:4"]) == {0: 8, 1: 8, 29: 8, 5: 4}
    said = str(Constraints(equal_in=4, pairs=parse_pairs("K4V2"), protect={0: 8}))
    assert said == "equal_in 4, pairs K4V2, protect 0:8"


def test_without_scipy_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(_extras, "_found", lambda module: module != "scipy")
    with pytest.raises(MissingExtraError, match=r"A plan with side constraints needs scipy: run pip install"):
        allocate(profile(2), Budget.bits(4, TOKENS), method=Exact(Constraints(equal_in=2)))

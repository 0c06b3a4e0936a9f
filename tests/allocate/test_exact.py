from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import KEYS, VALUES, channel, fingerprint, profile, token

from kvloom.allocate import Budget, Exact, allocate
from kvloom.allocate._units import units_of
from kvloom.errors import PlanError
from kvloom.plan import Plan, Window

WINDOWS = [Window(), Window(sinks=4, recent=32), Window(recent_ratio=0.1)]
FEW_KEYS = (channel(2), channel(4), channel(4, 32))
FEW_VALUES = (token(2), token(4), token(16))
LONG_KEYS = (channel(2), channel(2, 128), channel(4, 256))


def specs_of(plan):
    return {i: (plan.spec(i).key, plan.spec(i).value) for i in plan.model.packed_layers}


def loss_of(measured, plan):
    return measured.table.predicted_loss(specs_of(plan))


def every_plan(measured, window=None):
    table = measured.table
    pairs = list(itertools.product(table.key_specs, table.value_specs))
    for picks in itertools.product(pairs, repeat=len(table.layers)):
        yield Plan.from_specs(measured.model, dict(zip(table.layers, picks, strict=True)), window=window)


def greedy(measured, budget, window):
    """Raises the side that gains most per byte, as long as anything fits."""
    table = measured.table
    specs = dict.fromkeys(table.layers, (table.key_specs[0], table.value_specs[0]))
    capacity = budget.total(measured.model)

    def nbytes(choice):
        plan = Plan.from_specs(measured.model, choice, window=window)
        return plan.nbytes(budget.batch, budget.tokens, budget.dtype)

    while True:
        best, gain = None, 0.0
        base, used = table.predicted_loss(specs), nbytes(specs)
        for layer, changed in changes(table, specs):
            grown = {**specs, layer: changed}
            cost = nbytes(grown)
            drop = base - table.predicted_loss(grown)
            if cost <= capacity and drop / max(cost - used, 1) > gain:
                best, gain = grown, drop / max(cost - used, 1)
        if best is None:
            return specs
        specs = best


def changes(table, specs):
    for layer, (key, value) in specs.items():
        yield from ((layer, (other, value)) for other in table.key_specs if other != key)
        yield from ((layer, (key, other)) for other in table.value_specs if other != value)


BUDGETS = st.one_of(
    st.builds(Budget.bits, st.floats(2.4, 12), st.sampled_from([300, 2048])),
    st.builds(Budget.bytes_per_token, st.floats(400, 3000), st.just(2048)),
    st.builds(
        Budget.memory,
        st.integers(10**6, 8 * 10**6),
        st.just(4),
        st.just(640),
        st.sampled_from([None, "float32"]),
    ),
)


@pytest.mark.parametrize("keys", [FEW_KEYS, LONG_KEYS], ids=["one page length", "mixed pages"])
@pytest.mark.parametrize("tokens", [500, 2048])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_no_plan_of_all_plans_within_the_budget_is_better(keys, tokens, window):
    measured = profile(2, seed=tokens, keys=keys, values=FEW_VALUES)
    plans = [(p.nbytes(1, tokens), loss_of(measured, p)) for p in every_plan(measured, window)]
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        low, high = min(n for n, _ in plans), max(n for n, _ in plans)
        capacity = low + int(share * (high - low))
        plan = allocate(measured, Budget.memory(capacity, 1, tokens), window=window)
        best = min(loss for nbytes, loss in plans if nbytes <= capacity)
        assert plan.nbytes(1, tokens) <= capacity
        assert loss_of(measured, plan) == pytest.approx(best, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(BUDGETS, st.sampled_from(WINDOWS), st.integers(0, 3))
def test_the_budget_holds_and_nothing_that_fits_is_left_on_the_table(budget, window, seed):
    measured = profile(4, seed=seed)
    table, capacity = measured.table, budget.total(measured.model)
    try:
        plan = allocate(measured, budget, window=window)
    except PlanError:
        bare = Plan.from_specs(measured.model, dict.fromkeys(range(4), (KEYS[0], VALUES[0])), window=window)
        assert bare.nbytes(budget.batch, budget.tokens, budget.dtype) > capacity
        return
    used = plan.nbytes(budget.batch, budget.tokens, budget.dtype)
    assert used <= capacity
    assert used == plan.provenance.certificate["used_bytes"]
    specs = specs_of(plan)
    for layer, changed in changes(table, specs):
        other = {**specs, layer: changed}
        if table.predicted_loss(other) < table.predicted_loss(specs) * (1 - 1e-12):
            larger = Plan.from_specs(measured.model, other, window=window)
            assert larger.nbytes(budget.batch, budget.tokens, budget.dtype) > capacity


@settings(deadline=None, max_examples=40)
@given(st.floats(1.5, 15), st.floats(0, 3), st.integers(0, 3))
def test_more_budget_never_predicts_more_loss(bits, more, seed):
    measured = profile(3, seed=seed)
    try:
        small = allocate(measured, Budget.bits(bits, 2048))
    except PlanError:
        return
    large = allocate(measured, Budget.bits(bits + more, 2048))
    assert loss_of(measured, large) <= loss_of(measured, small)


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_greedy(seed):
    measured = profile(6, seed=seed)
    budget = Budget.bits(3.2, 2048)
    plan = allocate(measured, budget)
    rival = measured.table.predicted_loss(greedy(measured, budget, Window()))
    assert loss_of(measured, plan) <= rival


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_kvmix_at_the_rules_own_bytes(seed):
    measured = profile(20, seed=seed)
    rule = allocate(measured, None, method="kvmix")
    plan = allocate(measured, Budget.bits(rule.true_bits(2048), 2048))
    assert plan.nbytes(1, 2048) <= rule.nbytes(1, 2048)
    assert loss_of(measured, plan) <= loss_of(measured, rule)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_uniform_at_its_own_bytes(bits):
    measured = profile(20)
    uniform = Plan.uniform(measured.model, key_bits=bits, value_bits=bits)
    plan = allocate(measured, Budget.bits(uniform.true_bits(2048), 2048))
    assert loss_of(measured, plan) < loss_of(measured, uniform)


def test_the_certificate_proves_the_plan():
    measured = profile(30)
    budget = Budget.bits(3.5, 2048, dtype="float16")
    plan = allocate(measured, budget)
    proof = plan.provenance.certificate
    assert proof["optimum"] == proof["lower_bound"] == plan.provenance.predicted_loss
    assert proof["optimum"] == pytest.approx(loss_of(measured, plan), rel=1e-12)
    assert proof["gap"] == 0.0
    assert 0.95 * proof["optimum"] <= proof["lagrangian_bound"] <= proof["optimum"]
    assert (proof["units"], proof["specs"]) == (60, 12)
    assert proof["capacity_bytes"] == budget.total(measured.model)
    assert proof["used_bytes"] == plan.nbytes(1, 2048) <= proof["capacity_bytes"]


@pytest.mark.parametrize("long", [False, True])
def test_codebooks_are_paid_for(long):
    """Costs of the units add up to the plan's bytes, also of equal codebooks of keys and values."""
    points = tuple(i / 3.5 - 1 for i in range(8))
    nuq = [spec.model_copy(update={"codec": "nuq", "codebook": points}) for spec in (channel(3), token(3))]
    measured = profile(layers=2, keys=[channel(2, 128 if long else 64), nuq[0]], values=[token(2), nuq[1]])
    budget = Budget.bits(4, tokens=1000)
    units = units_of(measured.table, budget, Window())
    specs = {layer: {} for layer in measured.table.layers}
    for unit in units:
        specs[unit.layer] |= unit.choices[-1]
    plan = Plan.from_specs(measured.model, {layer: (own["key"], own["value"]) for layer, own in specs.items()})
    assert sum(int(unit.options.cost[-1]) for unit in units) == plan.nbytes(1, 1000)


def test_mixed_page_lengths_make_a_layer_one_unit():
    plan = allocate(profile(5, keys=LONG_KEYS, values=FEW_VALUES), Budget.bits(6, 2048))
    proof = plan.provenance.certificate
    assert (proof["units"], proof["specs"]) == (5, 9)


def test_provenance_says_how_to_make_the_plan_again():
    measured = profile()
    source = allocate(measured, Budget.memory("1 MB", 2, 512, "float32")).provenance
    assert (source.signal, source.solver) == ("error_gradient", "exact")
    assert source.calibration == measured.calibration.model_dump()
    assert Budget(**source.budget) == Budget.memory("1 MB", 2, 512, "float32")


def test_equal_input_gives_equal_plans_that_survive_the_file(tmp_path):
    measured = profile(8)
    first, second = (allocate(measured, Budget.bits(3, 2048)) for _ in range(2))
    assert specs_of(first) == specs_of(second)
    first.save(tmp_path / "kv_plan.json")
    assert Plan.load(tmp_path / "kv_plan.json") == first


def test_layers_of_equal_worth_get_one_answer():
    """Identical layers tie everywhere; the plan must not depend on anything but the input."""
    measured = profile(6)
    table = measured.table
    row = [table.key_loss[0]] * 6, [table.value_loss[0]] * 6
    tied = measured.model_copy(update={"table": table.model_copy(update={"key_loss": row[0], "value_loss": row[1]})})
    plans = [specs_of(allocate(tied, Budget.bits(3.3, 2048))) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


def test_an_unlimited_budget_gives_the_least_loss_of_all():
    measured = profile()
    plan = allocate(measured, Budget.bits(100, 2048))
    assert loss_of(measured, plan) == 0.0
    assert plan.true_bits(2048) == 16.0


def test_prefill_and_window_reach_the_plan():
    plan = allocate(profile(), Budget.bits(6, 2048), window=Window(sinks=4), prefill="quantized")
    assert plan.prefill == "quantized"
    assert plan.spec(0).window == Window(sinks=4)


def test_a_budget_too_small_is_told_what_would_do():
    measured = profile(keys=FEW_KEYS, values=FEW_VALUES)
    smallest = Plan.uniform(measured.model, key_bits=2, value_bits=2)
    least, reach = smallest.nbytes(1, 2048), smallest.true_bits(2048)
    with pytest.raises(PlanError) as caught:
        allocate(measured, Budget.bits(2.0, 2048))
    message = str(caught.value)
    assert message.startswith("budget of 2 true bits at 2048 tokens is ")
    assert f"{least} bytes ({reach:.4g} true bits)" in message
    assert allocate(measured, Budget.memory(least, 1, 2048)).nbytes(1, 2048) == least
    with pytest.raises(PlanError, match=str(least)):
        allocate(measured, Budget.memory(least - 1, 1, 2048))


def test_the_exact_method_needs_a_budget():
    with pytest.raises(PlanError, match="budget is missing"):
        allocate(profile(), None)


def test_a_candidate_that_does_not_fit_the_model_is_refused():
    measured = profile(2, values=(token(4), token(2, 128)))
    with pytest.raises(PlanError, match="group_size 128 does not divide head_dim 64"):
        allocate(measured, Budget.bits(4, 2048))


def test_a_context_shorter_than_a_page_costs_sixteen_bits_whatever_the_plan():
    measured = profile()
    assert allocate(measured, Budget.bits(16, 60)).true_bits(60) == 16.0
    with pytest.raises(PlanError, match=r"\(16 true bits\)"):
        allocate(measured, Budget.bits(15.9, 60))


def test_batch_and_compute_dtype_count():
    measured = profile(4)
    half = allocate(measured, Budget.memory(10**6, 1, 1000))
    assert specs_of(allocate(measured, Budget.memory(4 * 10**6, 4, 1000))) == specs_of(half)
    wide = allocate(measured, Budget.memory(10**6, 1, 1000, dtype="float32"))
    assert wide.nbytes(1, 1000, "float32") <= 10**6
    assert loss_of(measured, wide) > loss_of(measured, half)


def test_only_packed_layers_are_planned():
    measured = profile(3)
    model = fingerprint(3).model_copy(update={"num_layers": 9, "packed_layers": (2, 5, 8)})
    table = measured.table.model_copy(update={"model": model, "layers": [2, 5, 8]})
    hybrid = measured.model_copy(update={"model": model, "table": table})
    plan = Exact().solve(hybrid, Budget.bits(4, 2048), window=Window(), prefill="exact")
    assert set(specs_of(plan)) == {2, 5, 8}
    assert math.isclose(plan.provenance.predicted_loss, table.predicted_loss(specs_of(plan)))

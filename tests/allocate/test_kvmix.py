from __future__ import annotations

import pytest
from profiles import channel, profile, token

from kvloom.allocate import Budget, KVmix, allocate
from kvloom.errors import PlanError
from kvloom.plan import Window


def bits_of(plan):
    specs = [plan.spec(i) for i in plan.model.packed_layers]
    return [spec.key.bits for spec in specs], [spec.value.bits for spec in specs]


def with_norms(measured, key, value):
    gradient = measured.gradient.model_copy(update={"key": key, "value": value})
    return measured.model_copy(update={"gradient": gradient})


def test_32_layers_get_the_papers_widths():
    key_bits, value_bits = bits_of(allocate(profile(32), None, method="kvmix"))
    assert (sorted(key_bits), sorted(value_bits)) == ([2] * 26 + [3] * 6, [2] * 26 + [4] * 6)
    assert sum(key_bits) / 32 == 2.1875  # "K 2.19"
    assert sum(value_bits) / 32 == 2.375  # "V 2.38"


def test_keys_and_values_are_ranked_apart():
    key, value = [float(i) for i in range(20)], [float(-i) for i in range(20)]
    key_bits, value_bits = bits_of(allocate(with_norms(profile(20), key, value), None, method="kvmix"))
    assert key_bits == [2] * 16 + [3] * 4
    assert value_bits == [4] * 4 + [2] * 16


@pytest.mark.parametrize(("layers", "high"), [(9, 0), (10, 2), (19, 2), (20, 4), (30, 6), (32, 6)])
def test_shares_are_rounded_down_one_by_one(layers, high):
    key_bits, value_bits = bits_of(allocate(profile(layers), None, method="kvmix"))
    assert (key_bits.count(3), value_bits.count(4)) == (high, high)


def test_equal_norms_rank_by_layer():
    tied = with_norms(profile(10), [1.0] * 10, [1.0] * 10)
    key_bits, _ = bits_of(allocate(tied, None, method="kvmix"))
    assert key_bits == [3, 3] + [2] * 8


def test_keys_are_grouped_per_channel_and_values_per_token():
    plan = allocate(profile(10), None, method="kvmix")
    assert {plan.spec(i).key.grouping for i in range(10)} == {"per_channel"}
    assert {plan.spec(i).key.group_size for i in range(10)} == {64}
    assert {plan.spec(i).value.grouping for i in range(10)} == {"per_token"}
    assert {plan.spec(i).value.group_size for i in range(10)} == {"head_dim"}


def test_group_sizes_can_be_the_papers():
    plan = allocate(profile(10), None, method=KVmix(32, 32), window=Window(recent_ratio=0.2))
    assert {plan.spec(i).key.group_size for i in range(10)} == {32}
    assert {plan.spec(i).value.group_size for i in range(10)} == {32}
    assert plan.spec(0).window == Window(recent_ratio=0.2)


def test_a_budget_is_refused_and_provenance_says_that_none_was_used():
    with pytest.raises(PlanError, match="budget must be None"):
        allocate(profile(), Budget.bits(3, 2048), method="kvmix")
    source = allocate(profile(), None, method="kvmix").provenance
    assert (source.signal, source.solver) == (
        "gradient_norm",
        "kvmix (fixed rule, takes no budget)",
    )
    assert source.budget is None
    assert source.certificate is None


def test_the_loss_is_predicted_where_the_table_knows_the_formats():
    known = profile(10)
    plan = allocate(known, None, method="kvmix")
    specs = {i: (plan.spec(i).key, plan.spec(i).value) for i in range(10)}
    assert plan.provenance.predicted_loss == known.table.predicted_loss(specs)
    unknown = profile(10, keys=(channel(4),), values=(token(4),))
    assert allocate(unknown, None, method="kvmix").provenance.predicted_loss is None


def test_a_profile_without_gradient_norms_is_refused():
    forward_only = profile(10).model_copy(update={"gradient": None})
    with pytest.raises(PlanError, match="has no gradient norms for method 'kvmix'"):
        allocate(forward_only, None, method="kvmix")

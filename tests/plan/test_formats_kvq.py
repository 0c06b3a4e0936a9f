"""KVQ: the first configuration, and the later one with its budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.plan import Plan, TensorSpec, Window, import_plan
from kvloom.plan.formats._norm_budget import spend_bits, spend_groups
from tests.plan.shapes import bits_of, notes_of, shape

MODEL = shape()
NORMS = {"w_k": [60.0, 40.0, 30.0, 20.0], "w_v": [10.0, 12.0, 14.0, 16.0]}
WIDTHS = [1, 2, 4, 6, 8]


def later(**fields: Any) -> Plan:
    return import_plan(fields, "kvq-norm", MODEL, substitute=fields.pop("substitute", False))


def test_the_readme_dict_is_more_for_keys_per_token() -> None:
    plan = import_plan({"backend": "quanto", "compute_dtype": "torch.float16", "device": "cuda"}, "kvq", MODEL)
    assert plan.spec(0).key == TensorSpec(bits=4, grouping="per_token", group_size=64)
    assert plan.spec(0).value == TensorSpec(bits=2, grouping="per_token", group_size=64)
    assert plan.spec(0).window == Window(recent=128)
    assert "compute_dtype torch.float16" in notes_of(plan)


def test_quantos_last_axis_is_per_channel() -> None:
    plan = import_plan({"axis_key": -1}, "kvq", MODEL)
    assert (plan.spec(0).key.grouping, plan.spec(0).value.grouping) == ("per_channel", "per_token")


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"nbits_k": 8}, "field nbits_k"),
        ({"backend": "hqq"}, "field backend"),
        ({"axis_key": 1}, "axis_key is 1 .*quanto itself rejects"),
        ({"nbits": 4}, "field nbits"),
        ({"q_group_size": 0}, "field q_group_size"),
    ],
)
def test_what_the_first_cannot_say_names_its_field(document: dict[str, Any], names: str) -> None:
    with pytest.raises(PlanError, match=names):
        import_plan(document, "kvq", MODEL)


def test_a_configuration_object_is_its_attributes() -> None:
    class KVQCacheConfig:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    fields = {"nbits_k": 4, "nbits_v": 4, "axis_key": -1, "compute_dtype": torch.float16}
    assert import_plan(KVQCacheConfig(**fields), "kvq", MODEL) == import_plan(fields, "kvq", MODEL)
    with pytest.raises(PlanError, match="field nbits"):
        import_plan(KVQCacheConfig(nbits=4), "kvq", MODEL)
    with pytest.raises(PlanError, match="kvq"):
        import_plan(4, "kvq", MODEL)


def test_fixed_bits_and_groups() -> None:
    plan = later(nbits={"k": 4, "v": 2}, group_size={"k": 32, "v": 128})
    assert (plan.spec(0).key.label, plan.spec(0).value.label) == ("4b/tok32/hqq", "2b/tok128/hqq")
    assert plan.spec(0).window == Window(recent=64)
    assert later(nbits=4).spec(0).key.label == "4b/tok64/hqq"


def test_a_budget_is_spent_by_norms(tmp_path: Path) -> None:
    plan = later(budget=4, bit_range=WIDTHS, norms=NORMS, group_budget=64, group_range=[32, 64, 128])
    bits = bits_of(plan)
    assert sum(k + v for k, v in bits) == 4 * 8
    assert bits[0][0] > bits[0][1]
    assert plan.spec(0).key.group_size < plan.spec(0).value.group_size
    path = tmp_path / "norms.json"
    path.write_text(json.dumps(NORMS))
    assert later(budget=4, bit_range=WIDTHS, norms=str(path), group_budget=64, group_range=[32, 64, 128]) == plan


def test_a_budget_that_no_width_meets_is_said() -> None:
    plan = later(budget=3.9, bit_range=[2, 8], norms=NORMS)
    assert "budget 3.9 is not met exactly" in notes_of(plan)


def test_one_window_for_both_only_when_asked() -> None:
    with pytest.raises(PlanError, match="residual_length is 64 for keys and 32 for values"):
        later(nbits=4, residual_length={"k": 64, "v": 32})
    plan = later(nbits=4, residual_length={"k": 64, "v": 32}, substitute=True)
    assert plan.spec(0).window == Window(recent=64)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, "give nbits or budget"),
        ({"nbits": 4, "budget": 4}, "give nbits or budget"),
        ({"nbits": 1.58}, r"nbits \(k, layer 0\) is 1.58"),
        ({"nbits": {"k": 4}}, r"nbits\.v"),
        ({"nbits": 4, "axis": 0}, r"axis\.k is 0 .*strides"),
        ({"nbits": 4, "group_size": 64, "group_budget": 64}, "group_size or group_budget"),
        ({"nbits": 4, "bit_range": [2, 4]}, "bit_range is given without budget"),
        ({"nbits": 4, "norms": NORMS}, "norms are given without"),
        ({"budget": 4}, "budget is spent by the norms"),
        ({"budget": 9, "norms": NORMS}, "field budget"),
        ({"budget": 4, "norms": {**NORMS, "w_v": [1.0]}}, "norms.w_k has 4 layers and norms.w_v has 1"),
        ({"budget": 4, "norms": {"w_k": [1.0], "w_v": [1.0]}}, "norms leaves out layer 1-3"),
        ({"budget": 4, "norms": "none.json"}, "cannot read none.json"),
        ({"budget": 4, "norms": {**NORMS, "w_v": [1.0, 1.0, 1.0, float("inf")]}}, "norms.w_v.3"),
        ({"budget": 1.58, "norms": NORMS}, "the budget buys from bit_range"),
        ({"nbits": 4, "group_size": 40}, "group_size .k, layer 0. 40 does not divide"),
    ],
)
def test_what_the_later_cannot_say_names_its_field(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(PlanError, match=names) as caught:
        later(**fields)
    assert "\n" not in str(caught.value)


def test_a_budget_below_the_smallest_width_is_said_to_be_passed() -> None:
    plan = later(budget=1, bit_range=[2, 4], norms=NORMS)
    assert "budget 1 is not met exactly: KVQ's rule spends 2.000 bits" in notes_of(plan)


def test_norms_may_be_in_any_unit() -> None:
    norms = [5.0, 1.0, 9.0, 2.0, 7.0, 3.0]
    assert spend_bits([1e-6 * norm for norm in norms], 22, [2, 3, 4, 8]) == spend_bits(norms, 22, [2, 3, 4, 8])


norms = st.lists(st.floats(1, 60), min_size=2, max_size=24)


@given(norms=norms, budget=st.sampled_from([2, 3, 4, 6]))
def test_a_budget_is_never_passed_and_larger_norms_get_no_less(norms: list[float], budget: int) -> None:
    widths = spend_bits(norms, len(norms) * budget, WIDTHS)
    assert sum(widths) <= len(norms) * budget
    large, small = max(range(len(norms)), key=norms.__getitem__), min(range(len(norms)), key=norms.__getitem__)
    assert norms[large] == norms[small] or widths[large] >= widths[small]


@given(norms=norms, average=st.sampled_from([32, 64, 128]))
def test_groups_move_towards_their_number(norms: list[float], average: int) -> None:
    sizes = spend_groups(norms, average, [16, 32, 64, 128, 256])
    assert set(sizes) <= {16, 32, 64, 128, 256}
    assert abs(sum(1 / size for size in sizes) - len(norms) / average) <= 1 / 16


def test_equal_norms_get_equal_groups() -> None:
    assert spend_groups([3.0] * 6, 64, [32, 64, 128]) == [64] * 6
    assert spend_bits([3.0] * 6, 24, [2, 4, 8]) == [4] * 6

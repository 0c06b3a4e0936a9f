"""KVmix: per-layer bits, both readings of its exact share."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.plan import Plan, Window, import_plan
from kvloom.plan.formats._kvmix import steady_recent
from tests.plan.shapes import bits_of, notes_of, shape

MODEL = shape()


def row(k: int = 2, v: int = 2, k_ratio: float | None = 0.2, v_ratio: float | None = 0.2) -> dict[str, Any]:
    ratios = {"k_residual_ratio": k_ratio, "v_residual_ratio": v_ratio}
    return {"k_bits": k, "v_bits": v, **{name: r for name, r in ratios.items() if r is not None}}


def read(document: Any, **options: Any) -> Plan:
    return import_plan(document, "kvmix", MODEL, **options)


def test_a_list_a_table_and_a_document_are_the_same() -> None:
    rows = [row(), row(4, 4), row(2, 4), row(1, 2)]
    plan = read(rows)
    assert bits_of(plan) == [(2, 2), (4, 4), (2, 4), (1, 2)]
    assert (plan.spec(0).key.label, plan.spec(0).value.label) == ("2b/ch32", "2b/tok32")
    assert read(dict(enumerate(rows))) == plan
    assert read({"quant_bits": rows, "group_size": 32, "rpc": "residual"}) == plan


@pytest.mark.parametrize(
    ("ratio", "group", "fewest", "most"),
    [(0.2, 32, 7, 38), (0.1, 32, 3, 34), (0.3, 32, 13, 44), (0.2, 11, 2, 12), (0.0, 32, 0, 31)],
)
def test_the_steady_state_is_that_of_the_rule(ratio: float, group: int, fewest: int, most: int) -> None:
    exact, seen = 4096, []
    for step in range(500):
        exact += step > 0
        exact -= (exact - math.floor(ratio * exact)) // group * group
        seen.append(exact)
    assert (min(seen[-100:]), max(seen[-100:])) == (fewest, most)
    assert steady_recent(ratio, group) == fewest


@given(ratio=st.floats(0, 0.9), group=st.sampled_from([11, 16, 32, 64]))
def test_the_steady_state_is_a_fixed_point(ratio: float, group: int) -> None:
    kept = steady_recent(ratio, group)
    assert math.floor(ratio * (kept + group)) == kept


def test_the_residual_reading_keeps_the_fewest_of_its_cycle_and_says_so() -> None:
    plan = read([row()] * 4)
    assert plan.spec(0).window == Window(recent=7)
    assert "shrinks within a few steps" in notes_of(plan)


def test_the_context_reading_is_a_ratio() -> None:
    plan = read({"quant_bits": [row()] * 4, "rpc": "context"})
    assert plan.spec(0).window == Window(recent_ratio=0.2)
    assert notes_of(plan) == ""


@pytest.mark.parametrize(("ratios", "recent"), [("paper", 3), ("repository", 7)])
def test_the_ratios_of_paper_and_repository(ratios: str, recent: int) -> None:
    plan = read({"quant_bits": [row(k_ratio=None, v_ratio=None)] * 4, "ratios": ratios})
    assert plan.spec(0).window == Window(recent=recent)


def test_three_bit_keys_are_those_of_its_words() -> None:
    plan = read({"quant_bits": [row(3, 2), row(), row(3, 2), row()], "rpc": "context"})
    assert [plan.spec(layer).key.label for layer in (0, 1, 2)] == ["3b/ch11/kvmix3", "2b/ch32", "3b/ch11/kvmix3"]
    assert plan.spec(0).value.label == "2b/tok32"
    assert "3-bit keys in layers 0,2 are groups of eleven tokens" in notes_of(plan)


def test_three_bit_values_and_windows_apart_are_substituted_only_when_asked() -> None:
    rows = [row(2, 3), row(), row(), row()]
    with pytest.raises(PlanError, match=r"3-bit values in layers 0 .*KVmix cannot run.*substitute=True"):
        read(rows)
    plan = read(rows, substitute=True)
    assert plan.spec(0).value.label == "3b/tok32"
    assert "3-bit groups of 32 instead" in notes_of(plan)
    rows = [row(3, 4, 0.2, 0.3), row(), row(), row()]
    with pytest.raises(PlanError, match="share one window"):
        read(rows)
    plan = read(rows, substitute=True)
    assert bits_of(plan)[0] == (3, 4)
    assert plan.spec(0).window == Window(recent=13)
    assert "2 for keys and 13 for values" in notes_of(plan)
    context = read({"quant_bits": rows, "rpc": "context"}, substitute=True)
    assert context.spec(0).window == Window(recent_ratio=0.3)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ([row()] * 3, "quant_bits leaves out layer 3"),
        ([row()] * 5, "quant_bits names layer 4"),
        ([row(5)] * 4, r"quant_bits\.0\.k_bits"),
        ([{**row(), "bits": 2}] * 4, r"quant_bits\.0\.bits"),
        ([row(k_ratio=1.5)] * 4, r"quant_bits\.0\.k_residual_ratio"),
        ([row(v_ratio=None)] * 4, "quant_bits.0 has v_bits 2 and no v_residual_ratio"),
        ({"quant_bits": [row(1, 1, None, None)] * 4, "ratios": "paper"}, "k_bits 1 and no k_residual_ratio"),
        ({"quant_bits": [row()] * 4, "rpc": "total"}, "field rpc"),
        ({"quant_bits": [row()] * 4, "group_size": 24}, "group_size is 24"),
        ({"quant_bits": [row()] * 4, "group_size": -1}, "field group_size"),
        ({"quant_bit": [row()] * 4}, "field quant_bits"),
        ([row(2, 4, 0.2, 0.3)] * 4, "share one window"),
    ],
)
def test_what_cannot_be_said_names_its_field(document: Any, names: str) -> None:
    with pytest.raises(PlanError, match=names) as caught:
        read(document)
    assert "\n" not in str(caught.value)

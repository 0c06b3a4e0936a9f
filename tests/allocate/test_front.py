"""The front of exact plans, its files, and the smallest plan that a measurement accepts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import channel, profile, token

from kvloom import _extras
from kvloom.allocate import Budget, Constraints, ExactFront, allocate, parse_pairs, save_front, smallest_plan
from kvloom.errors import MissingExtraError, PlanError
from kvloom.plan import Plan, Window

TOKENS = 2048


def loss_of(plan):
    return plan.provenance.predicted_loss


@pytest.mark.parametrize("window", [None, Window(sinks=4)])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_plans_rise_in_bytes_and_fall_in_loss(window, dtype):
    measured = profile(6)
    front = ExactFront(measured, TOKENS, batch=2, dtype=dtype, window=window, prefill="quantized")
    plans = front.plans(20)
    sizes = [front.nbytes(plan) for plan in plans]
    assert 15 <= len(plans) <= 20
    assert sizes == sorted(set(sizes)) == [plan.nbytes(2, TOKENS, dtype) for plan in plans]
    assert sizes[0] == front.least
    losses = list(map(loss_of, plans))
    assert losses == sorted(set(losses), reverse=True)
    assert losses[-1] == 0.0
    assert {plan.prefill for plan in plans} == {"quantized"}
    assert plans[0].spec(0).window == (window or Window())
    for plan, size in zip(plans, sizes, strict=True):
        again = allocate(measured, Budget.memory(size, 2, TOKENS, dtype), window=window)
        assert loss_of(again) == loss_of(plan)


def test_every_plan_keeps_to_the_constraints():
    pytest.importorskip("scipy")
    keys, values = [channel(b) for b in (2, 4, 8)], [token(b) for b in (2, 4, 8)]
    only = Constraints(pairs=parse_pairs("K4V2,K4V4"))
    front = ExactFront(profile(4, keys=keys, values=values), TOKENS, constraints=only)
    plans = front.plans(8)
    assert len(plans) > 3
    found = {(plan.spec(i).key.bits, plan.spec(i).value.bits) for plan in plans for i in range(4)}
    assert found == {(4, 2), (4, 4)}
    assert front.nbytes(plans[0]) == front.least


def test_a_front_of_one_plan():
    front = ExactFront(profile(2, keys=[channel(2)], values=[token(2)]), TOKENS)
    assert len(front.plans()) == 1
    with pytest.raises(PlanError, match="points is 1"):
        front.plans(1)


def test_its_files_are_plans_a_list_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    front = ExactFront(profile(3), TOKENS, batch=2)
    plans = front.plans(6)
    names = save_front(plans, tmp_path / "new" / "front", TOKENS, 2)
    folder = tmp_path / "new" / "front"
    assert {file.name for file in folder.iterdir()} == {*names, "front.json", "front.png"}
    assert [Plan.load(folder / name) for name in names] == plans
    listed = json.loads((folder / "front.json").read_text())
    assert (listed["tokens"], listed["batch"], listed["dtype"]) == (TOKENS, 2, "float16")
    for entry, name, plan in zip(listed["plans"], names, plans, strict=True):
        assert entry == {
            "file": name,
            "true_bits": plan.true_bits(TOKENS),
            "nbytes": plan.nbytes(2, TOKENS),
            "predicted_loss": loss_of(plan),
        }
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_extras, "_found", lambda module: module != "matplotlib")
    with pytest.raises(MissingExtraError, match="The picture of a front needs matplotlib"):
        save_front(ExactFront(profile(2), TOKENS).plans(3), tmp_path / "front", TOKENS)
    assert not (tmp_path / "front").exists()


@settings(max_examples=30)
@given(st.floats(-6, 1), st.floats(0, 0.3), st.integers(0, 3))
def test_the_smallest_plan_within_the_limit_is_found(log_limit, spread, seed):
    """The table's own loss plays the measurement."""
    limit, measured = 10.0**log_limit, profile(4, seed=seed)
    front = ExactFront(measured, TOKENS)
    asked = []

    def measure(plan):
        asked.append(front.nbytes(plan))
        return {"value": loss_of(plan), "low": loss_of(plan) * (1 - spread), "high": loss_of(plan) * (1 + spread)}

    plan = smallest_plan(front, limit, measure)
    size = front.nbytes(plan)
    assert measure(plan)["high"] <= limit
    asked.pop()
    if size > front.least:
        below = front.plan(max(int(size / 1.01) - 1, front.least))
        assert measure(below)["high"] > limit
        asked.pop()
    assert len(asked) == len(set(asked)) <= 12
    proof = plan.provenance.certificate
    assert proof["max_kld"] == limit
    assert proof["measured_kld"] == measure(plan)
    assert [it["nbytes"] for it in proof["tried"]] == asked[:-1]
    assert proof["optimum"] == loss_of(plan)


def test_a_limit_out_of_reach_and_a_senseless_one_are_refused():
    front = ExactFront(profile(2, keys=[channel(2)], values=[token(2), token(3)]), TOKENS)
    with pytest.raises(PlanError, match=r"max_kld 0.01 is out of reach, .* has 0.5 \[0.4, 0.6\]: raise it"):
        smallest_plan(front, 0.01, lambda plan: {"value": 0.5, "low": 0.4, "high": 0.6})
    for limit in (0, -1, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="max_kld is"):
            smallest_plan(front, limit, lambda plan: {"value": 0.0, "low": 0.0, "high": 0.0})

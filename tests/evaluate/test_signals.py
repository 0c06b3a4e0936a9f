"""The head-to-head of signals: plans, their measurement in shares, records, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import DataError, PlanError
from kvloom.evaluate import PlanCounts, Protocol, compare_signals, fidelity, plan_contestant
from kvloom.evaluate._random_plans import random_plans
from kvloom.plan import Fingerprint, Window
from kvloom.report import HEADINGS, ranking_notes, ranking_rows
from kvloom.signals import Profile, default_specs
from tests.evaluate.tiny_llama import random_windows, tiny_model

SHAPE = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=30,
    packed_layers=tuple(range(30)),
    num_kv_heads=3,
    head_dim=64,
    dtype="bfloat16",
)
TOKENS = 1031
PROTOCOL = Protocol(chunk=128, block=64, unscored=64)
COUNTS = PlanCounts(5, 4, 4.5, low=3.2, high=6)
WINDOWS, PROMPTS = random_windows(2, 263), random_windows(2, 150, seed=1)
SIGNALS = ["state_error", "fisher"]


def drawn(counts: PlanCounts):
    return random_plans(SHAPE, *default_specs(64), window=Window(sinks=4), tokens=TOKENS, counts=counts)


def test_plans_are_spread_over_true_bits_or_have_equal_ones() -> None:
    plans = drawn(PlanCounts(20, 10, 3.0))
    bits = {group: [it.plan.true_bits(TOKENS) for it in plans if it.group == group] for group in ("spread", "equal")}
    assert bits["spread"] == pytest.approx(np.linspace(2.2, 6, 20), abs=0.02)
    assert bits["equal"] == pytest.approx([3.0] * 10, abs=0.02)
    assert len({it.name for it in plans}) == len({it.plan.to_json() for it in plans}) == 30
    for it in plans:
        assert {layer: (it.plan.spec(layer).key, it.plan.spec(layer).value) for layer in range(30)} == it.specs
        assert it.plan.prefill == "quantized"


def test_formats_scatter_by_about_a_bit() -> None:
    keys = [spec[0].bits for it in drawn(PlanCounts(0, 20, 4.0)) for spec in it.specs.values()]
    assert 0.6 < np.std(keys) < 1.4
    assert len(set(keys)) >= 4


@given(st.floats(2.0, 7.5), st.integers(0, 3))
def test_any_target_within_reach_is_met(bits: float, seed: int) -> None:
    plans = drawn(PlanCounts(0, 4, bits, seed=seed))
    assert [it.plan.true_bits(TOKENS) for it in plans] == pytest.approx([bits] * 4, abs=0.03)
    assert drawn(PlanCounts(0, 4, bits, seed=seed)) == plans


@pytest.mark.parametrize("bits", [1.2, 9.0])
def test_targets_out_of_reach_are_refused(bits: float) -> None:
    with pytest.raises(DataError, match="no random plan of these formats has"):
        drawn(PlanCounts(0, 4, bits))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def compared(model, **changes):
    arguments = {"wanted": SIGNALS, "plans": COUNTS, "protocol": PROTOCOL, "batch": 2, "texts": ["t"], **changes}
    return compare_signals(model, WINDOWS, PROMPTS, **arguments)


def stable(records):
    return [{key: value for key, value in record.items() if key not in ("when", "seconds")} for record in records]


@pytest.fixture(scope="module")
def records(model):
    return compared(model)


def test_records_hold_what_was_measured_and_predicted(model, records) -> None:
    signals = [record for record in records if record["kind"] == "signal_comparison"]
    plans = [record for record in records if record["kind"] == "random_plan"]
    assert [record["name"] for record in signals] == SIGNALS
    assert [record["group"] for record in plans] == ["spread"] * 5 + ["equal"] * 4
    for record in signals:
        assert (record["spread"]["plans"], record["equal"]["plans"]) == (5, 4)
        assert record["scored_tokens"] == 2 * (263 - 64 - 1)
        assert (record["prompts"], record["prompt_tokens"]) == (2, 150)
        assert record["seconds"] > 0
        for group in ("spread", "equal"):
            own = [plan for plan in plans if plan["group"] == group]
            order = [np.argsort(np.argsort([of(plan) for plan in own])) for of in (_kld, _predicted(record["name"]))]
            expected = np.corrcoef(*order)[0, 1]
            assert record[group]["spearman"]["value"] == pytest.approx(expected)
            assert record[group]["kld"] == [min(map(_kld, own)), max(map(_kld, own))]


def _kld(plan) -> float:
    return plan["kld"]


def _predicted(name: str):
    return lambda plan: plan["predicted"][name]


def test_kld_is_that_of_fidelity(model, records) -> None:
    shape = Fingerprint.of(model)
    plans = random_plans(shape, *default_specs(shape.head_dim), window=Window(sinks=4), tokens=263, counts=COUNTS)
    found = {record["name"]: record for record in records if record["kind"] == "random_plan"}
    contestants = [plan_contestant(it.plan, model, name=it.name, method="random") for it in plans[::4]]
    for record in fidelity(model, WINDOWS, contestants, protocol=PROTOCOL):
        assert found[record["name"]]["kld"] == pytest.approx(record["kld"]["value"], rel=1e-5)
        assert found[record["name"]]["true_bits"] == record["true_bits"]


def test_shares_are_gathered_and_nothing_is_done_twice(model, records, tmp_path: Path) -> None:
    out, told = tmp_path / "signals.jsonl", []
    for share in ((1, 2), (2, 2)):
        assert compared(model, out=out, share=share) == []
        assert not out.exists()
    forward, passes = model.forward, []
    model.forward = lambda *a, **k: (passes.append(k.get("past_key_values")), forward(*a, **k))[1]
    try:
        gathered = compared(model, out=out, progress=lambda what, done, total: told.append(what))
        assert stable(gathered) == stable(records)
        assert all(cache is None for cache in passes)  # signals alone: no plan is measured again
        passes.clear()
        assert stable(compared(model, out=out)) == stable(records)
        assert not passes
    finally:
        del model.forward
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [it["id"] for it in gathered]
    assert Profile.load(tmp_path / "signals-fisher.json").table.signal == "fisher"
    assert any(what.startswith("fisher") for what in told)


def test_a_killed_run_goes_on(model, records, tmp_path: Path) -> None:
    out = tmp_path / "signals.jsonl"

    class Killed(Exception):
        pass

    def progress(what: str, done: int, total: int) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        compared(model, out=out, progress=progress)
    assert len((tmp_path / "signals.jsonl.pieces").read_text().splitlines()) == 6
    assert stable(compared(model, out=out)) == stable(records)


def test_the_table_has_the_best_signal_among_equal_bits_first(records) -> None:
    rows = ranking_rows(records)
    assert {row[0] for row in rows} == set(SIGNALS)
    assert all(len(row) == len(HEADINGS) for row in rows)
    first, last = (next(it for it in records if it["name"] == row[0]) for row in (rows[0], rows[-1]))
    assert first["equal"]["spearman"]["value"] >= last["equal"]["spearman"]["value"]
    notes = ranking_notes(records)
    assert "396 scored tokens in 2 windows" in notes
    assert "equal bits: 4 random plans" in notes


def test_one_group_alone_is_enough(model) -> None:
    (record, *_) = compared(model, plans=PlanCounts(4, 0, low=3.2, high=6), wanted=["weight_frobenius"])
    assert "equal" not in record
    assert ranking_rows([record])[0][4:] == ("", "")


def test_bad_requests_are_refused_before_anything_is_measured(model, monkeypatch) -> None:
    monkeypatch.setattr("kvloom.evaluate._fidelity.score_rows", None)
    with pytest.raises(PlanError, match="signal 'magic' is unknown"):
        compared(model, wanted=["magic"])
    with pytest.raises(DataError, match="windows hold 100 tokens each"):
        compare_signals(model, WINDOWS[:, :100], PROMPTS, plans=COUNTS, protocol=PROTOCOL)
    with pytest.raises(DataError, match="spread is 3: give at least 4 plans, or 0"):
        compared(model, plans=PlanCounts(3, 0, low=3.2, high=6))
    with pytest.raises(DataError, match="never fill a page"):
        compare_signals(model, WINDOWS, PROMPTS[:, :60], plans=COUNTS, protocol=PROTOCOL)
    assert torch.is_grad_enabled()

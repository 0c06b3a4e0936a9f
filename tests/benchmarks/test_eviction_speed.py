"""The benchmark of eviction's speed runs, and compares what it says it compares."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import eviction_speed


@pytest.fixture
def model():
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()


def test_it_measures_prompts_and_steps(model, monkeypatch):
    for name in ("SECONDS", "MIN_SAMPLES"):
        monkeypatch.setattr(f"kvloom.bench._timing.{name}", 1)
    records = eviction_speed.run(model, 4, 700, 2, 1)
    assert [record["kind"] for record in records] == ["prompt"] * 4 + ["layer"] * 6 + ["step"] * 10
    assert [record["policy"] for record in records[4:10]] == [None, "snapkv", "adakv"] * 2
    assert all(0 < record["host_seconds"] <= record["seconds"] for record in records[4:10])
    assert [record["share"] for record in records[10:15]] == list(eviction_speed.SHARES)
    taken = [record["layer_bytes"] for record in records[10:15]]
    assert taken == sorted(taken, reverse=True)
    assert all(record["byte_ratio"] == taken[0] / record["layer_bytes"] for record in records[10:15])
    assert len(eviction_speed.table(records[10:])) == 2 + 10
    assert len(eviction_speed.verdicts(records)) == 2 + 8


def test_verdicts_are_of_the_bounds():
    prompt = {"kind": "prompt", "cache": "growing", "tokens": 9, "seconds": 1.0}
    records = eviction_speed.compared([{**prompt, "share": 1}, {**prompt, "share": 0.5, "seconds": 1.06}])
    step = {"kind": "step", "policy": "snapkv", "layer_bytes": 100, "seconds": 1.0, "masked_seconds": 1.0, "share": 1}
    half = {**step, "share": 0.5, "layer_bytes": 50, "masked_seconds": 0.6}
    records += eviction_speed.compared([step, half, {**half, "masked_seconds": 0.63}])
    assert [verdict.reached for verdict in eviction_speed.verdicts(records)] == [False, True, False]

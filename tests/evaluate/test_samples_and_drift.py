"""Samples of text, and the slope of the KLD over decoded steps."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from kvloom.errors import DataError
from kvloom.evaluate import (
    Contestant,
    Protocol,
    dense_contestant,
    drift,
    plan_contestant,
    samples,
)
from kvloom.plan import Plan
from tests.evaluate.tiny_llama import Letters, random_windows, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_samples_continue_the_prompt(model, tmp_path):
    out = tmp_path / "samples.jsonl"
    coarse = plan_contestant(Plan.uniform(model, 1, 1), model, name="K1V1", method="uniform", target_bits=1.5)
    prompt = "One prompt that fills a page or two. " * 5
    records = samples(model, Letters(), prompt, [dense_contestant(model), coarse], tokens=10, out=out)
    assert [record["tokens"] for record in records] == [10, 10]
    assert [len(record["text"]) for record in records] == [10, 10]
    assert records[0]["text"] != records[1]["text"]
    assert records[1]["prefill"] == "exact"
    assert [json.loads(line) for line in out.read_text().splitlines()] == records


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(DataError, match="empty"):
        samples(model, Letters(), "", [dense_contestant(model)])


class Decaying(DynamicCache):
    """A cache that shrinks all it holds a little at every pass, as repeated rounding would."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        shown = super().update(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = layer.keys * 0.995, layer.values * 0.995
        return shown


def test_a_cache_that_decays_drifts_and_one_that_is_append_only_does_not(model):
    windows = random_windows(2, 640)
    decaying = Contestant("decaying", "x", None, lambda: Decaying(config=model.config))
    plan = Plan.uniform(model, 4, 4, key_group_size=16)
    steady = plan_contestant(plan, model, name="K4V4", method="uniform", prefill="quantized")
    worse, same = drift(model, windows, [decaying, steady], protocol=Protocol(8, 32, 128))
    assert worse["steps"] == 640 - 128 - 1
    assert len(worse["blocks"]) == 16
    assert worse["slope"]["low"] > 0.1
    assert same["slope"]["low"] < 0 < same["slope"]["high"] < 0.1


def test_drift_needs_no_single_steps_in_streaming_mode(model):
    windows = random_windows(1, 200)
    steady = plan_contestant(Plan.uniform(model, 2, 2), model, name="K2V2", method="uniform", prefill="quantized")
    one, many = (drift(model, windows, [steady], protocol=Protocol(chunk, 32, 64))[0] for chunk in (1, 64))
    assert one["slope"] == pytest.approx(many["slope"], rel=1e-2, abs=1e-6)  # fp32 sums of other lengths
    assert torch.allclose(torch.tensor(one["blocks"]), torch.tensor(many["blocks"]), rtol=1e-3)

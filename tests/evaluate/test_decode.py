"""Decode speed: who is timed when, and what the records say."""

from __future__ import annotations

import json
import time
from typing import ClassVar

import pytest
from transformers import DynamicCache

from kvloom.errors import DataError
from kvloom.evaluate import (
    Contestant,
    decode_speed,
    dense_contestant,
    paired_speed,
    plan_contestant,
)
from kvloom.plan import Plan
from tests.evaluate.tiny_llama import random_windows, tiny_model


class Slow(DynamicCache):
    """A cache that takes 8 ms a layer."""

    steps: ClassVar[list[int]] = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if key_states.shape[2] == 1:
            time.sleep(0.008)
            self.steps.append(self.get_seq_length())
        return super().update(key_states, value_states, layer_idx)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def slow(model):
    return Contestant("slow", "slow", None, lambda: Slow(config=model.config))


def test_times_pair_and_the_slow_one_is_slower(model, tmp_path):
    out = tmp_path / "decode.jsonl"
    plan = plan_contestant(Plan.uniform(model), model, name="plan", method="uniform", target_bits=3.5)
    contestants = [dense_contestant(model), plan, slow(model)]
    records = decode_speed(model, random_windows(1, 100)[0], contestants, context=80, steps=9, name="tiny", out=out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == records
    for record in records:
        speed = record["tokens_per_s"]
        assert 0 < speed["low"] <= speed["value"] <= speed["high"]
        assert len(record["step_s"]) == record["steps"] == 9
        assert (record["context"], record["device"], record["model"]) == (80, "cpu", "tiny")
    assert records[1]["target_bits"] == 3.5
    gain = paired_speed(records[0], records[2])
    assert 1 < gain["low"] <= gain["value"]
    assert paired_speed(records[2], records[0])["high"] < 1


def test_every_round_decodes_the_next_true_token(model):
    Slow.steps.clear()
    decode_speed(model, random_windows(1, 30)[0], [slow(model)], context=20, steps=4)
    assert Slow.steps[::2] == [20, 21, 22, 23, 24, 25]  # two rounds of warm-up


def test_records_of_two_runs_do_not_pair(model):
    tokens = random_windows(1, 30)[0]
    first, second = (decode_speed(model, tokens, [dense_contestant(model)], context=20, steps=4)[0] for _ in range(2))
    with pytest.raises(DataError, match="not of one run"):
        paired_speed(first, second)


def test_a_short_text_is_refused(model):
    with pytest.raises(DataError, match="need 26 tokens"):
        decode_speed(model, random_windows(1, 25)[0], [dense_contestant(model)], context=20, steps=4)


def test_token_ids_of_another_tokenizer_are_refused(model):
    tokens = random_windows(1, 30)[0]
    tokens[24] = 97  # only decoded, not of the prompt
    with pytest.raises(DataError, match="vocabulary has 97"):
        decode_speed(model, tokens, [dense_contestant(model)], context=20, steps=4)

"""Memory over context: bytes are the plan's own, contexts fit beside the weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from kvloom.evaluate import (
    Contestant,
    Settings,
    choose,
    dense_contestant,
    evaluate,
    memory,
    plan_contestant,
    weights_of,
)
from kvloom.plan import GPUS, Plan, Window
from tests.evaluate.tiny_llama import Letters, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def plan(model):
    return Plan.uniform(model, 4, 2, key_group_size=16, window=Window(sinks=4))


def test_bytes_are_those_of_the_arithmetic(model, plan):
    dense, packed = memory(
        model, [dense_contestant(model), plan_contestant(plan, model, name="K4V2", method="uniform")]
    )
    assert packed["tokens"] == [2**power for power in range(10, 21)]
    assert packed["nbytes"] == [plan.nbytes(1, tokens, torch.bfloat16) for tokens in packed["tokens"]]
    for tokens, nbytes in zip(dense["tokens"][:2], dense["nbytes"][:2], strict=True):
        shape, cache = plan.model, DynamicCache(config=model.config)
        states = torch.zeros(1, shape.num_kv_heads, tokens, shape.head_dim, dtype=torch.bfloat16)
        for layer in range(shape.num_layers):
            cache.update(states, states, layer)
        assert nbytes == sum(side.nbytes for layer in cache.layers for side in (layer.keys, layer.values))


def test_contexts_fit_beside_the_weights(model, plan):
    (packed,) = memory(model, [plan_contestant(plan, model, name="K4V2", method="uniform")])
    weights = packed["weight_bytes"]
    assert weights == weights_of(model.config) == sum(2 * it.numel() for it in model.parameters())
    for gpu, room in GPUS.items():
        longest = packed["fits"][gpu]
        assert plan.nbytes(1, longest, torch.bfloat16) + weights <= room
        assert plan.nbytes(1, longest + 1024, torch.bfloat16) + weights > room or longest == 2**27


def test_caches_without_arithmetic_are_left_out(model):
    other = Contestant("other", "quanto", None, lambda: DynamicCache(config=model.config))
    assert [record["name"] for record in memory(model, [dense_contestant(model), other])] == ["dense"]


def test_memory_is_a_task(model, plan, tmp_path):
    out = tmp_path / "eval.jsonl"
    contestants = [dense_contestant(model), plan_contestant(plan, model, name="K4V2", method="uniform")]
    records = evaluate(model, Letters(), choose(["memory"], Settings()).tasks, contestants, out=out)
    assert [record["kind"] for record in records] == ["memory", "memory"]
    assert evaluate(model, Letters(), choose(["memory"], Settings()).tasks, contestants, out=out)
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 2

"""Evict entries: what is accepted, what is refused, how many bytes they leave, and budgets of equal bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.plan import Evict, Fingerprint, LayerPlan, Plan, TensorSpec, Window, evict_to_bytes

MODEL = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=6,
    packed_layers=(0, 1, 2, 3, 4, 5),
    num_kv_heads=2,
    head_dim=64,
    dtype="float16",
)
TOKEN = 2 * 2 * 64 * 2  # bytes of a token of one layer in fp16


def plan(bits: dict[str, int] | None = None, *, evict: Evict | None = None, **window: Any) -> Plan:
    entries = [
        LayerPlan(
            layers=layers,
            key=TensorSpec(bits=b, grouping="per_channel" if b < 16 else "per_token"),
            value=TensorSpec(bits=b, grouping="per_token"),
            window=Window(**{"sinks": 4, **window}),
            evict=evict,
        )
        for layers, b in (bits or {"0-5": 4}).items()
    ]
    return Plan(model=MODEL, layers=tuple(entries))


def test_a_plan_keeps_its_evict_entry(tmp_path) -> None:
    evict = Evict(policy="snapkv", budget=0.25, protect=((0, 64),), parameters={"window": 16, "pooling": "avg"})
    made = plan(evict=evict)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    entry = json.loads((tmp_path / "plan.json").read_text())["layers"][0]["evict"]
    assert entry == {
        "policy": "snapkv",
        "budget": 0.25,
        "protect": [[0, 64]],
        "parameters": {"window": 16, "pooling": "avg"},
    }
    assert "snapkv keeps 25.00% tokens" in made.describe()
    assert "h2o keeps 256 tokens" in plan(evict=Evict(policy="h2o", budget=256)).describe()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"policy": "topk", "budget": 64}, "layers.0.evict.*policy 'topk' is unknown"),
        ({"policy": "snapkv", "budget": 0}, "layers.0.evict.budget.*greater than 0"),
        ({"policy": "snapkv", "budget": 1.5}, "a whole number of tokens per KV head, or a share between 0 and 1"),
        ({"policy": "snapkv", "budget": 20}, r"layer 0: evict\.budget 20 is too small .* at least 36 per KV head"),
        ({"policy": "snapkv", "budget": 64, "protect": [[64, 0]]}, "evict.protect.*0 <= start < end"),
        ({"policy": "snapkv", "budget": 64, "parameters": {"size": 3}}, "size: nothing is known by this name"),
        ({"policy": "snapkv", "budget": 64, "when": 3}, "evict.when: nothing is known by this name"),
        ({"policy": "streaming_llm", "budget": 640, "parameters": {"sinks": 6}}, r"set window\.sinks to 6"),
    ],
)
def test_bad_entries_are_named(tmp_path, fields, says) -> None:
    data = json.loads(plan().to_json())
    data["layers"][0]["evict"] = fields
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=says):
        Plan.load(tmp_path / "plan.json")


def test_a_prompt_that_is_chosen_from_is_read_exactly(tmp_path) -> None:
    data = json.loads(plan(evict=Evict(policy="h2o", budget=256)).to_json())
    (tmp_path / "plan.json").write_text(json.dumps({**data, "prefill": "quantized"}))
    with pytest.raises(PlanError, match=r'evict of layer 0 chooses .*: set prefill to "exact"'):
        Plan.load(tmp_path / "plan.json")


@given(st.integers(1, 3000), st.integers(0, 200), st.integers(1, 3))
def test_kept_tokens_count_with_their_slots(prompt, decoded, batch) -> None:
    made, held = plan(evict=Evict(policy="snapkv", budget=400)), min(prompt, 400) + decoded
    more = 6 * batch * 2 * (2 * held + 4)  # 2 bytes of a slot a token, an int32 number of pages a head
    assert made.nbytes(batch, prompt + decoded, decoded=decoded) == plan().nbytes(batch, held) + more
    summing = plan(evict=Evict(policy="h2o", budget=400, parameters={"decode": False}))
    exact = max(0, held - 4) % 64
    sums = 6 * batch * 2 * 8 * (exact + max(0, held - 4) // 64)
    ours = summing.nbytes(batch, prompt + decoded, decoded=decoded)
    assert ours == made.nbytes(batch, prompt + decoded, decoded=decoded) + sums


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "streaming_llm", "adakv", "expected_attention"])
@pytest.mark.parametrize("dense", [128, 256, 1024])
def test_layers_of_other_bits_take_the_same_bytes(policy: str, dense: int) -> None:
    bits = {"0": 16, "1-2": 8, "3": 4, "4-5": 2}
    made = evict_to_bytes(plan(bits), policy, dense, parameters={"recent": 8} if policy == "h2o" else {})
    budgets = [entry.evict.budget for entry in made.layers if entry.evict]
    assert budgets == sorted(budgets)
    alone = [single(entry).nbytes(1, 65_536) for entry in made.layers]
    assert all(dense * TOKEN * 0.98 < nbytes <= dense * TOKEN for nbytes in alone)
    more = [
        single(entry.model_copy(update={"evict": entry.evict.model_copy(update={"budget": entry.evict.budget + 1})}))
        for entry in made.layers
        if entry.evict
    ]
    assert all(one.nbytes(1, 65_536) > dense * TOKEN for one in more)
    assert made.nbytes(1, 65_536) == sum(n * len(e.indices) for n, e in zip(alone, made.layers, strict=True))


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize("dense", [32, 64, 256])
def test_layers_of_a_pyramid_take_the_same_bytes_together(bits: int, dense: int) -> None:
    made = evict_to_bytes(plan({"0-5": bits}), "pyramidkv", dense, tokens=2048)
    (entry,) = made.layers
    assert entry.evict
    assert len({made.room(layer).limit(2048) for layer in range(6)}) > 1
    assert 0.95 * 6 * dense * TOKEN < made.nbytes(1, 2048) <= 6 * dense * TOKEN
    more = entry.model_copy(update={"evict": entry.evict.model_copy(update={"budget": entry.evict.budget + 1})})
    assert Plan(model=MODEL, layers=(more,)).nbytes(1, 2048) > 6 * dense * TOKEN


def single(entry: LayerPlan) -> Plan:
    one = MODEL.model_copy(update={"num_layers": 1, "packed_layers": (0,)})
    return Plan(model=one, layers=(entry.model_copy(update={"layers": 0}),))


def test_two_bits_keep_several_times_the_tokens() -> None:
    made = evict_to_bytes(plan({"0-2": 2, "3-5": 16}), "snapkv", 512)
    low, full = (entry.evict.budget for entry in made.layers if entry.evict)
    assert full < 512
    assert low > 4 * full


def test_too_few_bytes_are_named() -> None:
    with pytest.raises(PlanError, match="layers 0-5: not even one token takes the bytes of 0 uncompressed ones"):
        evict_to_bytes(plan(), "snapkv", 0)
    with pytest.raises(PlanError, match=r"evict\.budget 7 is too small"):
        evict_to_bytes(plan(), "snapkv", 8)

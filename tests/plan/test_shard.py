"""The part of a plan that one rank follows: its KV heads, their specs, matrices and bytes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import ModelError, PlanError
from kvloom.plan import Evict, HeadPlan, LayerPlan, Plan, PlanTensors, TensorSpec, Window, rotation_name
from tests.plan.shapes import shape

HEADS, DIM = 6, 32
MODEL = shape(layers=3, heads=HEADS, dim=DIM)
SPECS = st.builds(
    TensorSpec,
    bits=st.sampled_from([2, 3, 4, 8]),
    grouping=st.sampled_from(["per_channel", "per_token"]),
    group_size=st.sampled_from([16, 32]),
    codec=st.sampled_from(["affine", "clipped"]),
    rotation=st.sampled_from([None, "hadamard"]),
)
HEAD_PLANS = st.dictionaries(
    st.integers(0, HEADS - 1), st.builds(HeadPlan, key=st.none() | SPECS, value=st.none() | SPECS)
)
ENTRIES = st.builds(
    LayerPlan,
    layers=st.just("0-2"),
    key=SPECS,
    value=SPECS,
    window=st.sampled_from([Window(), Window(sinks=4, recent=7), Window(recent_ratio=0.2)]),
    heads=HEAD_PLANS,
)
KEY = TensorSpec(bits=4, grouping="per_channel", group_size=64)
VALUE = TensorSpec(bits=2, grouping="per_token", group_size="head_dim")
TURNED = KEY.model_copy(update={"rotation": "calibrated"})


def plan_of(**entry: object) -> Plan:
    return Plan(model=MODEL, layers=(LayerPlan(**{"layers": "0-2", "key": KEY, "value": VALUE, **entry}),))


@given(ENTRIES, st.sampled_from([1, 2, 3, 6]), st.integers(1, 400))
def test_the_parts_are_the_whole(entry: LayerPlan, world_size: int, tokens: int):
    plan = Plan(model=MODEL, layers=(entry,))
    parts = [plan.shard(rank, world_size) for rank in range(world_size)]
    count = HEADS // world_size
    for layer in MODEL.packed_layers:
        found = [part.spec(layer).head(head) for part in parts for head in range(count)]
        assert found == [entry.head(head) for head in range(HEADS)]
        assert all(part.spec(layer).window == entry.window for part in parts)
    assert sum(part.nbytes(3, tokens) for part in parts) == plan.nbytes(3, tokens)
    for part in parts:
        assert part.model == MODEL.model_copy(update={"num_kv_heads": count})
        assert Plan.model_validate_json(part.to_json()) == part


def test_one_rank_holds_the_plan_itself_and_others_the_same_part_every_time():
    plan = plan_of(heads={1: HeadPlan(key=VALUE)})
    assert plan.shard(0, 1) is plan
    assert plan.shard(1, 2) is plan.shard(1, 2)
    changed = plan.model_copy(update={"prefill": "quantized"})
    assert changed.shard(1, 2).prefill == "quantized"


def test_a_rank_has_the_matrices_of_its_heads_and_no_others():
    """Keys of layer 1 are calibrated in heads 0 and 5, values in every head of layer 2."""
    torch.manual_seed(0)
    names = [rotation_name(1, "key"), rotation_name(2, "value")]
    matrices = {name: torch.randn(HEADS, DIM, DIM).half() for name in names}
    turned = VALUE.model_copy(update={"rotation": "calibrated"})
    entries = (
        LayerPlan(layers=0, key=KEY, value=VALUE),
        LayerPlan(layers=1, key=KEY, value=VALUE, heads={h: HeadPlan(key=TURNED) for h in (0, 5)}),
        LayerPlan(layers=2, key=KEY, value=turned),
    )
    plan = Plan(model=MODEL, layers=entries, tensors=PlanTensors.of(matrices))
    held = [plan.shard(rank, 3).rotations() for rank in range(3)]
    assert [sorted(rotations) for rotations in held] == [[1, 2], [2], [1, 2]]
    for rank, rotations in enumerate(held):
        own = slice(2 * rank, 2 * rank + 2)
        assert rotations[2]["value"].equal(matrices[names[1]][own])
        assert rank == 1 or rotations[1]["key"].equal(matrices[names[0]][own])
    some = Plan(model=MODEL, layers=(*entries[:2], LayerPlan(layers=2, key=KEY, value=VALUE)), tensors=plan.tensors)
    assert [some.shard(rank, 3).tensors is None for rank in range(3)] == [False, True, False]


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 4, "the 6 KV heads of LlamaForCausalLM cannot be split evenly over 4 processes"),
        (0, 12, "cannot be split evenly over 12 processes: start a number of them that divides 6"),
        (2, 2, "there is no rank 2 of 2"),
        (-1, 2, "there is no rank -1 of 2"),
        (0, 0, "there is no rank 0 of 0"),
    ],
)
def test_heads_that_cannot_be_split(rank: int, world_size: int, message: str):
    with pytest.raises(ModelError, match=message):
        plan_of().shard(rank, world_size)


def test_heads_that_compete_cannot_be_on_several_ranks():
    plan = plan_of(evict=Evict(policy="adakv", budget=256))
    with pytest.raises(PlanError, match=r"layers 0-2: evict\.policy 'adakv' lets all KV heads of a layer compete"):
        plan.shard(0, 2)
    assert plan.shard(0, 1) is plan
    kept = plan_of(evict=Evict(policy="snapkv", budget=256))
    assert sum(kept.shard(rank, 2).nbytes(1, 900, decoded=100) for rank in range(2)) == kept.nbytes(1, 900, decoded=100)


def test_pages_hold_the_same_tokens_on_every_rank():
    wide = KEY.model_copy(update={"group_size": 128})
    plan = plan_of(heads={0: HeadPlan(key=wide)})
    assert plan.shard(0, 2).spec(0).head(0)[0] == wide
    with pytest.raises(PlanError, match="KV heads 3 to 5 would hold 64 tokens on their rank and hold 128 beside"):
        plan.shard(1, 2)
    assert plan_of(heads={0: HeadPlan(key=wide), 4: HeadPlan(key=wide)}).shard(1, 2).spec(0).head(1)[0] == wide

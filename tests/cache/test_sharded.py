"""Tensor parallelism on two processes: the tokens of one process, each process with the bytes of its own KV heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from sharded_worker import ROOM, error, generated, ready
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kvloom.cache import LoomCache, local_shape, shard_of
from kvloom.plan import (
    Evict,
    Fingerprint,
    HeadPlan,
    LayerPlan,
    Plan,
    PlanTensors,
    TensorSpec,
    Window,
    rotation_name,
)

HERE = Path(__file__).parent
KV_HEADS = 4
KEY = TensorSpec(bits=3, grouping="per_channel", group_size=64)
VALUE = TensorSpec(bits=2, grouping="per_token", group_size="head_dim")


def by_head(shape: Fingerprint) -> Plan:
    """Every KV head its own way, one of them with a matrix of its own."""
    heads = {
        0: HeadPlan(key=TensorSpec(bits=4, grouping="per_channel", group_size=32, rotation="hadamard")),
        1: HeadPlan(key=TensorSpec(bits=2, grouping="per_channel"), value=TensorSpec(bits=16, grouping="per_token")),
        3: HeadPlan(value=TensorSpec(bits=5, grouping="per_token", group_size=16, rotation="calibrated")),
    }
    generator = torch.Generator().manual_seed(5)
    size = (KV_HEADS, shape.head_dim, shape.head_dim)
    turns = [torch.linalg.qr(torch.randn(size, generator=generator)).Q.half() for _ in shape.packed_layers]
    names = [rotation_name(layer, "value") for layer in shape.packed_layers]
    entry = LayerPlan(layers="0-1", key=KEY, value=VALUE, window=Window(sinks=4, recent=9), heads=heads)
    return Plan(model=shape, layers=(entry,), tensors=PlanTensors.of(dict(zip(names, turns, strict=True))))


def evicting(shape: Fingerprint, policy: str) -> Plan:
    evict = Evict(policy=policy, budget=100)
    return Plan(model=shape, layers=(LayerPlan(layers="0-1", key=KEY, value=VALUE, evict=evict),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharded")
    model = tiny.build("llama", num_attention_heads=8, num_key_value_heads=KV_HEADS, vocab_size=128)
    model.save_pretrained(made / "model")
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(made / "model")
    (made / "plans").mkdir()
    shape = Fingerprint.of(model)
    Plan.uniform(model, 4, 2).save(made / "plans" / "uniform.json")
    by_head(shape).save(made / "plans" / "by_head.json")
    evicting(shape, "snapkv").save(made / "plans" / "snapkv.json")
    evicting(shape, "adakv").save(made / "competing.json")
    return made


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU, which find each other on a free port."""
    paths = [str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """What each process tells."""
    done = torchrun(HERE / "sharded_worker.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    return ready(folder, device="cpu")


def test_each_process_holds_half_of_the_heads(told: list[dict[str, Any]]):
    assert [it["shard"] for it in told] == [[0, 2], [1, 2]]
    assert [it["heads"] for it in told] == [KV_HEADS // 2] * 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [("uniform", "growing"), ("uniform", "fixed"), ("by_head", "growing"), ("by_head", "fixed"), ("snapkv", "growing")],
)
def test_tokens_of_one_process_and_bytes_of_its_own_heads(told, folder: Path, alone, name: str, kind: str):
    whole = generated(alone, Plan.load(folder / "plans" / f"{name}.json"), ROOM if kind == "fixed" else None)
    parts = [it[name][kind] for it in told]
    for part in parts:
        assert part["tokens"] == whole["tokens"]
        assert part["heads"] == [KV_HEADS // 2]
        assert part["nbytes"] == part["said"] < 0.7 * whole["nbytes"]
    if (name, kind) == ("uniform", "growing"):
        assert sum(part["nbytes"] for part in parts) == whole["nbytes"]
    if name == "by_head":
        assert parts[0]["nbytes"] != parts[1]["nbytes"]


def test_another_processs_file_is_refused(told: list[dict[str, Any]], folder: Path, alone):
    for rank, it in enumerate(told):
        assert it["restored"]
        assert all(it["restored"])
        wanted = f"holds the KV heads of rank {1 - rank} of 2 and this is rank {rank} of 2"
        assert it["other's"].startswith("CacheError")
        assert wanted in it["other's"]
    plan = Plan.load(folder / "plans" / "uniform.json")
    assert "rank 1 of 2 and this is rank 0 of 1" in error(lambda: LoomCache.load(folder / "1.safetensors", plan, alone))


def test_what_processes_cannot_do_together_is_refused(told: list[dict[str, Any]]):
    for it in told:
        assert it["competing"].startswith("PlanError: layers 0-1: evict.policy 'adakv' lets all KV heads")
        assert it["invariant"].startswith("ModelError: batch_invariant cannot fix the order")


def test_random_weights_are_made_in_parts(told: list[dict[str, Any]]):
    drawn = [it["random"] for it in told]
    assert [it["rows"] for it in drawn] == [16, 16]
    assert all(0.01 < it["spread"] < 0.03 for it in drawn)  # initializer_range is 0.02
    assert drawn[0]["tokens"] == drawn[1]["tokens"]


class _Mesh:
    """A device mesh as far as it is asked; transformers 5.23 gives one of three dimensions."""

    def __init__(self, rank: int, ndim: int) -> None:
        self.rank, self.ndim = rank, ndim

    def __getitem__(self, name: str) -> _Mesh:
        assert (self.ndim, name) == (3, "tp")
        return _Mesh(self.rank, 1)

    def get_local_rank(self) -> int:
        assert self.ndim == 1
        return self.rank


@pytest.mark.parametrize("ndim", [1, 3])
@pytest.mark.parametrize(
    ("rules", "size", "expected"),
    [
        ({"model.layers.*.self_attn.k_proj": "colwise"}, 2, (1, 2)),
        ({"model.layers.*.self_attn.qkv_proj": "colwise"}, 4, (1, 4)),
        ({"model.layers.*.self_attn.k_proj": "colwise_gather_output"}, 2, (0, 1)),
        ({"model.layers.*.mlp.up_proj": "colwise"}, 2, (0, 1)),
        ({"model.layers.*.self_attn.k_proj": "colwise"}, 1, (0, 1)),
        ({"model.layers.*.self_attn.k_proj": "colwise"}, None, (0, 1)),
    ],
)
def test_which_heads_a_process_holds(rules: dict[str, str], size: int | None, expected: tuple[int, int], ndim: int):
    assert shard_of(SimpleNamespace(tp_size=size, tp_plan=rules, _device_mesh=_Mesh(1, ndim))) == expected


def test_heads_that_cannot_be_split_are_refused_before_anything_is_packed():
    model = tiny.build("llama")
    model._tp_size, model._device_mesh = 4, _Mesh(0, 3)
    refused = "ModelError: the 2 KV heads of LlamaConfig cannot be split evenly over 4 processes"
    assert error(lambda: LoomCache(tiny.eight_bit(model), model)).startswith(refused)
    assert error(lambda: local_shape(model)).startswith(refused)

"""Drawn plans and lengths, random keys and values, and ways to fill a cache with them, shared by the cache tests."""

from __future__ import annotations

from functools import cache

import tiny
import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from kvloom.cache import LoomCache
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, PlanTensors, TensorSpec, Window, rotation_name

KV_HEADS = 2
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)
FEWER = settings(EXAMPLES, max_examples=15)


def config_of(head_dim, layers=1):
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=4 * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
    )
    config._attn_implementation = "kvloom"
    return config


@st.composite
def tensor_specs(draw, head_dim):
    bits = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]))
    grouping = draw(st.sampled_from(["per_channel", "per_token"]))
    sizes = [16, 32, 64, 128, 256] if grouping == "per_channel" else ["head_dim", 16, 32, 64]
    fitting = [n for n in sizes if grouping == "per_channel" or n == "head_dim" or head_dim % n == 0]
    return TensorSpec(
        bits=bits,
        grouping=grouping,
        group_size=draw(st.sampled_from(fitting)),
        symmetric=draw(st.booleans()),
        rotation=draw(st.sampled_from([None, None, "hadamard", "calibrated"])) if bits < 16 else None,
        outliers=draw(st.sampled_from([0.0, 0.0, 0.01, 0.1])) if bits < 16 else 0.0,
    )


@st.composite
def windows(draw):
    sinks = draw(st.sampled_from([0, 1, 4, 70]))
    if draw(st.booleans()):
        return Window(sinks=sinks, recent=draw(st.sampled_from([0, 1, 32, 100])))
    return Window(sinks=sinks, recent_ratio=draw(st.sampled_from([0.1, 0.25, 0.5])))


@st.composite
def plans(draw, prefill=None):
    head_dim = draw(st.sampled_from([16, 48, 64]))
    heads = {}
    if draw(st.booleans()):
        heads[draw(st.integers(0, KV_HEADS - 1))] = HeadPlan(
            key=draw(st.none() | tensor_specs(head_dim)), value=draw(st.none() | tensor_specs(head_dim))
        )
    entry = LayerPlan(
        layers=0,
        key=draw(tensor_specs(head_dim)),
        value=draw(tensor_specs(head_dim)),
        window=draw(windows()),
        heads=heads,
    )
    specs = [spec for head in range(KV_HEADS) for spec in entry.head(head)]
    calibrated = any(spec.rotation == "calibrated" for spec in specs)
    return Plan(
        model=Fingerprint.of(config_of(head_dim)),
        layers=(entry,),
        prefill=prefill or draw(st.sampled_from(["exact", "quantized"])),
        tensors=matrices(head_dim) if calibrated else None,
    )


@cache
def matrices(head_dim, seed=0, layers=(0,)):
    """Well-conditioned random rotations of every side and head."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in layers:
        for side in ("key", "value"):
            turn = torch.linalg.qr(torch.randn(KV_HEADS, head_dim, head_dim, generator=generator)).Q
            made[rotation_name(layer, side)] = (turn * torch.linspace(0.5, 2.0, head_dim)).half()
    return PlanTensors.of(made)


@st.composite
def cuts(draw, tokens):
    """Lengths that add up to ``tokens``."""
    places = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=6))) if tokens > 1 else []
    return [b - a for a, b in zip([0, *places], [*places, tokens], strict=True)]


def new_cache(plan, **options):
    return LoomCache(plan, config_of(plan.model.head_dim), **options)


def states(plan, tokens, *, batch=1, dtype=torch.float32, seed=0):
    """Random keys with channels of very different sizes and offsets, and random values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, KV_HEADS, tokens, plan.model.head_dim)
    scale = torch.logspace(-2, 1, plan.model.head_dim)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    return (key * scale + scale.flip(0)).to(dtype), value.to(dtype)


def fill(cache, key, value, chunks):
    handle = None
    for k, v in zip(key.split(chunks, dim=2), value.split(chunks, dim=2), strict=True):
        handle, _ = cache.update(k, v, 0)
    return handle


def contents(cache):
    return {name: tensor.clone() for name, tensor in cache.packed_layers[0].tensors()}


def assert_same(cache, other):
    assert cache.get_seq_length() == other.get_seq_length()
    ours, theirs = contents(cache), contents(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name


def assert_bytes(cache, batch, dtype):
    assert cache.nbytes() == cache.plan.nbytes(batch, cache.get_seq_length(), dtype)

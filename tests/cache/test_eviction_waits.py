"""What a prompt's end asks of the host. Tensors on the meta device have no data: whoever waits for some, raises."""

from __future__ import annotations

import pytest
import torch
from drawn import KV_HEADS, config_of, new_cache, states
from evicting import POLICIES, QUERY_HEADS, SCALING, evicting
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvloom.cache import loom_attention
from kvloom.kernels import _torch
from kvloom.plan import Fingerprint, HeadPlan, Plan, TensorSpec, Window

EIGHT = TensorSpec(bits=8, grouping="per_channel")
FOUR = TensorSpec(bits=4, grouping="per_channel")
PROMPT, BUDGET = 500, 150
ONE_EACH = sorted(set(POLICIES) - {"adakv", "h2o", "streaming_llm"})  # no head competes, no step is watched

MOST_OPERATIONS = 100
"""Of torch, that eviction adds to a layer's prompt: one takes up to 18 us of a slow host."""


@pytest.fixture(autouse=True)
def packing_is_one_operation(monkeypatch):
    """As on a GPU, and so is unpacking."""

    def encode(self, key, value, layout, flags=None):
        return key.new_empty((*key.shape[:2], key.shape[2] // layout.page_tokens, layout.nbytes), dtype=torch.uint8)

    def decode(self, data, layout, dtype):
        shape = (*data.shape[:2], data.shape[2] * layout.page_tokens, layout.head_dim)
        return data.new_empty(shape, dtype=dtype), data.new_empty(shape, dtype=dtype)

    monkeypatch.setattr(_torch.TorchBackend, "encode", encode)
    monkeypatch.setattr(_torch.TorchBackend, "decode", decode)


def plan_of(policy=None, *, sinks=0, mixed=False):
    plan = Plan.from_specs(Fingerprint.of(config_of(16)), {0: (EIGHT, EIGHT)}, window=Window(sinks=sinks))
    if mixed:
        heads = {1: HeadPlan(key=FOUR)}
        plan = plan.model_copy(update={"layers": tuple(x.model_copy(update={"heads": heads}) for x in plan.layers)})
    return evicting(plan, policy, BUDGET) if policy else plan


def layer_of(plan, fixed):
    return new_cache(plan, max_tokens=PROMPT + 200 if fixed else None).packed_layers[0]


class NoWaitToSend(TorchDispatchMode):
    """What goes to the device is sent without waiting until it has arrived."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            waits = not (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
            assert source.device == target.device or not waits, func
        if name in ("index", "index_put_"):
            assert all(index is None or index.device == args[0].device for index in args[1]), func
        return out


class Looks(TorchFunctionMode):
    """Counts what is read from the meta device, and makes something up: a page and 86 tokens of every head."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist and args[0].device.type == "meta":
            self.count += 1
            return [[number] * args[0].shape[1] for number in (1, 86, 0)]
        return func(*args, **(kwargs or {}))


def read(layer, tokens, *, batch=2, is_padded=False):
    """Append tokens of the meta device, and let the layer see that they have been attended to."""
    key, query = (torch.empty(batch, heads, tokens, 16, device="meta") for heads in (KV_HEADS, QUERY_HEADS))
    mask = key.new_empty((batch, 1, tokens, layer.length + tokens), dtype=torch.bool) if is_padded else None
    with NoWaitToSend():
        handle, _ = layer.update(key, key)
        handle.observe(query, scaling=SCALING, mask=mask, softcap=None, sink_logits=None)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("policy", ONE_EACH)
@pytest.mark.parametrize("is_padded", [False, True])
def test_heads_that_do_not_compete_cost_no_wait(policy, fixed, is_padded):
    for sinks, mixed in ((0, False), (4, True)):
        layer = layer_of(plan_of(policy, sinks=sinks, mixed=mixed), fixed)
        read(layer, PROMPT, is_padded=is_padded)
        if not fixed:
            limit = layer.room.limit(PROMPT)
            assert layer._resident() == limit
            assert layer.sinks.tokens + layer.num_pages * 64 + layer.tail.tokens == limit
        assert not layer.is_in_prompt


@pytest.mark.parametrize("fixed", [False, True])
def test_heads_that_compete_cost_one(fixed):
    layer = layer_of(plan_of("adakv"), fixed)
    with Looks() as looks:
        read(layer, PROMPT)
    assert looks.count == 1


@pytest.mark.parametrize("policy", ["snapkv", "adakv"])
def test_a_second_prompt_costs_one(policy):
    layer = layer_of(plan_of(policy), fixed=False)
    with Looks() as looks:
        read(layer, PROMPT)
        first = looks.count
        read(layer, PROMPT)
    assert looks.count - first == 1


def test_steps_of_a_growing_cache_cost_no_wait():
    layer = layer_of(plan_of("snapkv", sinks=4), fixed=False)
    read(layer, PROMPT)
    before = layer.num_pages
    for _ in range(130):
        read(layer, 1)
    assert layer.num_pages - before == 2


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(plan, fixed):
    """Of a prompt, with what all layers share made before."""
    for _ in range(2):
        cache = new_cache(plan, max_tokens=PROMPT + 200 if fixed else None)
        key, value = states(plan, PROMPT)
        query = torch.randn(1, QUERY_HEADS, PROMPT, key.shape[-1])
        with Operations() as counted:
            handle, _ = cache.update(key, value, 0)
            loom_attention(torch.nn.Module(), query, handle, handle, None, scaling=SCALING)
    return counted.count


@pytest.mark.parametrize("fixed", [False, True])
def test_eviction_adds_few_operations_to_a_prompt(fixed):
    assert operations(plan_of("snapkv"), fixed) - operations(plan_of(), fixed) <= MOST_OPERATIONS

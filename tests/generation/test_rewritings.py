"""Gates, norms and rotary positions of a compiled step become operators of ours where they are alike; tokens stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from kvloom import kernels
from kvloom.generation import _loop, _step
from kvloom.generation._gates import JoinGates
from kvloom.generation._graphs import Rewriting
from kvloom.generation._norms import JoinNorms
from kvloom.generation._passes import Passes
from kvloom.generation._products import JoinProducts
from kvloom.generation._ropes import JoinRopes, _rope_of
from kvloom.generation._sums import SumRanks
from kvloom.plan import TensorSpec
from tests.cache import tiny
from tests.generation.summing_worker import Seen
from tests.generation.test_decode_loop import both

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rewritten(function: Callable[..., Any], *args: Any) -> tuple[Any, Counter[str]]:
    """A traced graph, and what it calls, after the passes."""
    traced = make_fx(function, decomposition_table=select_decomp_table())(*args)
    _step._PASSES(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced, Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_function")


def assert_same(traced: Any, function: Callable[..., Any], *args: Any) -> None:
    ours, theirs = traced(*args), function(*args)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}.get(one.dtype, 1e-6)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.view(-1, x.shape[-1]) @ weight.permute(1, 0)).view(*x.shape[:-1], -1)


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.nn.functional.silu(linear(x, gate)) * linear(x, up),)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_one_product(dtype: torch.dtype):
    args = numbers(4, 1, 32, dtype=dtype), numbers(48, 32, dtype=dtype, seed=1), numbers(48, 32, dtype=dtype, seed=2)
    traced, calls = rewritten(gated, *args)
    assert calls["kvloom.gated_product.default"] == 1
    assert set(calls) <= {"kvloom.gated_product.default", "aten.view.default", "aten.reshape.default"}
    assert_same(traced, gated, *args)
    reversed_, calls = rewritten(
        lambda x, gate, up: (linear(x, up) * torch.nn.functional.silu(linear(x, gate)),), *args
    )
    assert calls["kvloom.gated_product.default"] == 1
    assert_same(reversed_, gated, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_may_be_one_weight(dtype: torch.dtype):
    """As in Phi 3."""

    def function(x: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor]:
        gate, up = linear(x, both).chunk(2, dim=-1)
        return (up * torch.nn.functional.silu(gate),)

    args = numbers(4, 1, 32, dtype=dtype), numbers(96, 32, dtype=dtype, seed=1)
    traced, calls = rewritten(function, *args)
    assert calls["kvloom.gated_product.default"] == 1
    assert calls["kvloom.products.default"] == 0
    assert_same(traced, function, *args)


def silu_of_thirds(x: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor]:
    first, second, third = linear(x, both).chunk(3, dim=-1)
    return (torch.nn.functional.silu(first) * second + third,)


def silu_of_tokens(x: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor]:
    gate, up = linear(x, both).chunk(2, dim=0)
    return (torch.nn.functional.silu(gate) * up,)


def silu_read_twice(x: torch.Tensor, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    whole = linear(x, both)
    gate, up = whole.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up, whole


@pytest.mark.parametrize("function", [silu_of_thirds, silu_of_tokens, silu_read_twice])
def test_other_parts_of_one_weight_stay_right(function: Callable[..., Any]):
    args = numbers(4, 1, 32), numbers(96, 32, seed=1)
    traced, calls = rewritten(function, *args)
    assert calls["kvloom.gated_product.default"] == 0
    assert_same(traced, function, *args)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b, c: (torch.nn.functional.gelu(linear(x, a)) * linear(x, b),),
        lambda x, a, b, c: (torch.nn.functional.silu(linear(x, a)) * linear(x + 1, b),),
        lambda x, a, b, c: (torch.nn.functional.silu(linear(x, a)) * linear(x, b), linear(x, a)),
        lambda x, a, b, c: (torch.nn.functional.silu(linear(x, a)) * linear(x, b) * linear(x, c).sum(),),
        lambda x, a, b, c: (torch.nn.functional.silu(linear(x, a) * 2) * linear(x, b),),
        lambda x, a, b, c: (torch.nn.functional.silu(linear(x, a)) * linear(x, b).sum(-1, keepdim=True),),
    ],
    ids=["gelu", "other rows", "read again", "three weights", "scaled", "summed"],
)
def test_what_is_no_gate_stays_right(function: Callable[..., Any]):
    args = numbers(4, 1, 32), *(numbers(48, 32, seed=seed) for seed in (1, 2, 3))
    traced, calls = rewritten(function, *args)
    assert calls["kvloom.gated_product.default"] == 0
    assert_same(traced, function, *args)


def normed(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, read: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As transformers' Llama has it."""
    norm = LlamaRMSNorm(1, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    h = residual + x
    return h, linear(norm(h), read)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_connection_and_its_norm_are_one(dtype: torch.dtype):
    args = numbers(4, 1, 32, dtype=dtype), numbers(4, 1, 32, dtype=dtype, seed=1), numbers(32, dtype=dtype, seed=2)
    args = (*args, numbers(16, 32, dtype=dtype, seed=3))
    traced, calls = rewritten(normed, *args)
    assert calls["kvloom.add_norm.default"] == 1
    assert not [name for name in calls if "pow" in name or "rsqrt" in name or "add.Tensor" in name]
    assert_same(traced, normed, *args)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w, p: (linear(plain_norm(x, w), p),),
        lambda x, r, w, p: (linear(plain_norm(x + r, 1 + w), p),),
        lambda x, r, w, p: (plain_norm(x + r, w),),
        lambda x, r, w, p: (linear(plain_norm(x + r[:1], w), p),),
        lambda x, r, w, p: (linear(plain_norm(x + 2.0, w), p),),
        lambda x, r, w, p: (linear(plain_norm(x + r, r), p),),
        lambda x, r, w, p: (linear(plain_norm(torch.add(x, r, alpha=2), w), p),),
        lambda x, r, w, p: (linear(w * (torch.rsqrt((x + r).abs()) * 2.0), p),),
        lambda x, r, w, p: (linear(torch.nn.functional.layer_norm(x + r, w.shape, w), p),),
    ],
    ids=[
        "no residual",
        "computed weight",
        "not read by a product",
        "broadcast",
        "a number",
        "a weight of each row",
        "alpha",
        "no norm but a root",
        "layer norm",
    ],
)
def test_other_norms_are_left(function: Callable[..., Any]):
    args = numbers(4, 1, 32), numbers(4, 1, 32, seed=1), numbers(32, seed=2), numbers(16, 32, seed=3)
    traced, calls = rewritten(function, *args)
    assert calls["kvloom.add_norm.default"] == 0
    assert_same(traced, function, *args)


def plain_norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))


def summed(x: torch.Tensor) -> torch.Tensor:
    collectives = torch.ops._c10d_functional
    out: torch.Tensor = collectives.wait_tensor(collectives.all_reduce(x, "sum", "0"))
    return out


def test_gates_of_other_widths_are_left():
    """One that all features share."""
    args = numbers(4, 1, 32), numbers(1, 32, seed=1), numbers(48, 32, seed=2)
    traced, calls = rewritten(gated, *args)
    assert calls["kvloom.gated_product.default"] == 0
    assert_same(traced, gated, *args)


@pytest.mark.parametrize("sum_comes_first", [True, False])
def test_a_sum_over_ranks_is_part_of_the_norm_behind_it(sum_comes_first: bool):
    def function(x, r, w, p):
        h = summed(x) + r if sum_comes_first else r + summed(x)
        return h, linear(plain_norm(h, w), p)

    args = numbers(4, 1, 32), numbers(4, 1, 32, seed=1), numbers(32, seed=2), numbers(16, 32, seed=3)
    traced = make_fx(function, tracing_mode="fake")(*args)
    _step._PASSES(traced.graph)
    (norm,) = traced.graph.find_nodes(op="call_function", target=torch.ops.kvloom.add_norm.default)
    assert norm.args[-1] == "0"
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    assert [it.all_input_nodes[0] for it in norm.args[:2]] == placeholders[:2]
    assert not [node for node in traced.graph.nodes if "sum_ranks" in str(node.target)]


def test_a_sum_that_something_else_reads_stays():
    def function(x, r, w, p):
        total = summed(x)
        h = r + total
        return h, linear(plain_norm(h, w), p), total * 2

    args = numbers(4, 1, 32), numbers(4, 1, 32, seed=1), numbers(32, seed=2), numbers(16, 32, seed=3)
    traced = make_fx(function, tracing_mode="fake")(*args)
    _step._PASSES(traced.graph)
    (norm,) = traced.graph.find_nodes(op="call_function", target=torch.ops.kvloom.add_norm.default)
    assert norm.args[-1] is None
    assert [node for node in traced.graph.nodes if "sum_ranks" in str(node.target)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("bits", ["eight bits", "turned"])
def test_tokens_of_whole_models(family: str, bits: str, monkeypatch: pytest.MonkeyPatch):
    """Gemma's norms and gates are others, and so is how its sliding windows are read: its tokens stay."""
    torch._dynamo.reset()
    seen = Seen(_step._PASSES)
    monkeypatch.setattr(_step, "_PASSES", seen)
    monkeypatch.setattr(_loop, "_compiles", lambda *_: True)
    model = tiny.exact(family)
    plan = tiny.eight_bit(model)
    if bits == "turned":
        (entry,) = plan.layers
        specs = {side: {**getattr(entry, side).model_dump(), "rotation": "hadamard"} for side in ("key", "value")}
        specs = {side: TensorSpec(**fields) for side, fields in specs.items()}
        plan = plan.model_copy(update={"layers": (entry.model_copy(update=specs),)})
    expected, actual, *_ = both(model, plan, tiny.prompt(57, batch=2), new=9)
    assert actual.equal(expected)
    is_llamas = family != "gemma3"
    layers, packed = model.config.num_hidden_layers, len(plan.model.packed_layers)
    assert seen.after["kvloom.gated_product.default"] == layers * is_llamas
    assert seen.after["kvloom.add_norm.default"] == 2 * layers * is_llamas
    assert seen.before["aten.neg.default"] >= 2 * layers
    assert seen.after["aten.neg.default"] == 2 * (layers - packed)  # positions are left to appending and attending


def half_turned(x: torch.Tensor) -> list[torch.Tensor]:
    return [-x[..., 8:], x[..., :8]]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos.unsqueeze(1) + torch.cat(half_turned(x), dim=-1) * sin.unsqueeze(1)


def rope_found(function: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32) -> tuple[Any, list[Any]]:
    """What is found of a rope, and the inputs."""
    angles = (numbers(2, 1, 16, seed=seed).to(dtype) for seed in (1, 2))
    graph = make_fx(function, tracing_mode="fake")(numbers(2, 4, 1, 16), *angles).graph
    return _rope_of(graph.output_node().args[0]), graph.find_nodes(op="placeholder")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, cos, sin: x * 2.0 + torch.cat(half_turned(x), dim=-1) * 3.0,
        lambda x, cos, sin: x * cos[:, None] + torch.cat([*half_turned(x), x[..., :0]], dim=-1) * sin[:, None],
        lambda x, cos, sin: x * cos[:, None] + torch.cat([-x[:1], x[1:]]) * sin[:, None],
        lambda x, cos, sin: x * cos[:, None] + x * sin[:, None],
        lambda x, cos, sin: x + 1.0,
        lambda x, cos, sin: x * cos[..., None, :] + torch.cat(half_turned(x), dim=-1) * sin[..., None, :],
    ],
)
def test_what_is_no_rope_is_none(function: Callable[..., torch.Tensor]):
    """Numbers in place of angles, other parts, another dimension, angles that are not of all heads."""
    assert rope_found(function)[0] is None


def test_a_rope_has_its_parts():
    found, inputs = rope_found(rope)
    assert found == tuple(inputs)


def test_angles_of_another_dtype_are_left():
    assert rope_found(rope, torch.float64)[0] is None


def test_the_operators_of_a_step_are_what_they_stand_for():
    backend = kernels.backend(torch.device("cpu"))
    x, residual, weight = numbers(3, 32), numbers(3, 32, seed=1), numbers(32, seed=2)
    h, y = backend.add_norm(x, residual, weight, 1e-5)
    norm = LlamaRMSNorm(32, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight)
    torch.testing.assert_close((h, y), (residual + x, norm(residual + x).detach()))
    mlp = LlamaMLP(tiny.build("llama").config)
    inputs = numbers(3, mlp.gate_proj.in_features)
    ours = backend.gated_product(inputs, mlp.gate_proj.weight, mlp.up_proj.weight)
    torch.testing.assert_close(mlp.down_proj(ours), mlp(inputs))


def test_passes_of_other_sources_are_told_apart():
    uuids = [Passes(it).uuid() for it in (JoinProducts(), SumRanks(), JoinGates(), JoinNorms(), JoinRopes())]
    assert len(set(uuids)) == 5
    assert uuids[2] == Passes(JoinGates()).uuid()
    assert all(isinstance(it, Rewriting) for it in (JoinGates(), JoinNorms(), JoinRopes()))

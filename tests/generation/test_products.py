"""Products that share their rows become one, and nothing else of a graph changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kvloom.generation._products import JoinProducts

WEIGHTS = {"q": 48, "k": 16, "v": 16, "o": 32, "gate": 80, "up": 80, "down": 32, "other": 16}


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (features, 80 if name == "down" else 32) for name, features in WEIGHTS.items()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def layer(x, w, bias):
    q, k, v = (x @ w[name].permute(1, 0) for name in "qkv")
    x = x + (q[:, :32] * k.sum(1, keepdim=True) + v.sum(1, keepdim=True)) @ w["o"].permute(1, 0)
    gate, up = (x @ w[name].permute(1, 0) for name in ("gate", "up"))
    x = (gate.tanh() * up) @ w["down"].permute(1, 0)
    biased = torch.addmm(bias, x, w["other"].permute(1, 0))
    computed = x @ (w["other"] * 2).permute(1, 0)
    return x, biased, computed


def joined(function, *args):
    """A traced graph, and what it calls, after the pass."""
    traced = make_fx(function)(*args)
    JoinProducts()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced, Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_function")


def test_weights_that_share_their_rows_are_one_product():
    x, bias = torch.randn(8, 32, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    traced, calls = joined(layer, x, weights(), bias)
    assert calls["kvloom.products.default"] == 5  # query, key and value; output; gate and up; down; with a bias
    assert calls["aten.mm.default"] == 1  # the weight that is computed
    assert calls["aten.addmm.default"] == 0
    for ours, theirs in zip(traced(x, weights(), bias), layer(x, weights(), bias), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_nine_rows_are_left_as_they_are():
    x, bias = torch.randn(9, 32, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    _, calls = joined(layer, x, weights(), bias)
    assert calls["kvloom.products.default"] == 0
    assert calls["aten.mm.default"] == 8


def test_biases_stay_with_their_weights():
    """As in Qwen 2, whose output has none."""

    def attention(x, w, biases):
        return [torch.addmm(biases[name], x, w[name].permute(1, 0)) for name in "qk"] + [x @ w["v"].permute(1, 0)]

    x = torch.randn(3, 32, dtype=torch.float64)
    biases = {name: torch.randn(WEIGHTS[name], dtype=torch.float64) for name in "qk"}
    traced, calls = joined(attention, x, weights(), biases)
    assert calls["kvloom.products.default"] == 1
    assert calls["aten.mm.default"] == calls["aten.addmm.default"] == 0
    for ours, theirs in zip(traced(x, weights(), biases), attention(x, weights(), biases), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_what_is_added_otherwise_is_left():
    def others(x, weight, bias, rows):
        weight = weight.permute(1, 0)
        return [
            torch.addmm(bias, x, weight, beta=2),
            torch.addmm(rows, x, weight),
            torch.addmm(bias * 2, x, weight),
        ]

    args = torch.randn(3, 32), torch.randn(16, 32), torch.randn(16), torch.randn(3, 16)
    traced, calls = joined(others, *args)
    assert calls["kvloom.products.default"] == 0
    assert calls["aten.addmm.default"] == 3
    for ours, theirs in zip(traced(*args), others(*args), strict=True):
        assert ours.equal(theirs)


def test_rows_may_be_a_product_that_is_joined():
    def two(x, first, second):
        return [x @ first.permute(1, 0) @ second.permute(1, 0)]

    args = torch.randn(3, 32), torch.randn(16, 32), torch.randn(48, 16)
    traced, calls = joined(two, *args)
    assert calls["kvloom.products.default"] == 2
    assert traced(*args)[0].equal(two(*args)[0])


@pytest.mark.parametrize(("count", "launches"), [(1, 1), (4, 1), (5, 2), (9, 3)])
def test_a_launch_has_at_most_four_weights(count, launches):
    many = [torch.randn(16, 32, dtype=torch.float64) for _ in range(count)]

    def all_of(x, many):
        return [x @ weight.permute(1, 0) for weight in many]

    x = torch.randn(3, 32, dtype=torch.float64)
    traced, calls = joined(all_of, x, many)
    assert calls["kvloom.products.default"] == launches
    for ours, theirs in zip(traced(x, many), all_of(x, many), strict=True):
        assert ours.equal(theirs)


def test_rows_are_the_same_however_often_they_are_viewed():
    x, first, second, third = torch.randn(2, 1, 64), torch.randn(16, 64), torch.randn(32, 64), torch.randn(16, 32)

    def views(x, *weights):
        return [x.view(-1, weight.shape[1]) @ weight.permute(1, 0) for weight in weights]

    traced, calls = joined(views, x, first, second, third)
    assert calls["kvloom.products.default"] == 2
    for ours, theirs in zip(traced(x, first, second, third), views(x, first, second, third), strict=True):
        assert ours.equal(theirs)


def test_a_product_can_have_the_rows_of_another():
    x, first, second = torch.randn(3, 32), torch.randn(64, 32), torch.randn(16, 64)
    traced, calls = joined(lambda x, a, b: x @ a.permute(1, 0) @ b.permute(1, 0), x, first, second)
    assert calls["kvloom.products.default"] == 2
    assert traced(x, first, second).equal(x @ first.T @ second.T)


def test_a_number_of_rows_that_is_not_known_is_left():
    traced = make_fx(lambda x, w: x @ w.permute(1, 0), tracing_mode="symbolic")(torch.randn(3, 32), torch.randn(16, 32))
    JoinProducts()(traced.graph)
    assert not [node for node in traced.graph.nodes if "kvloom" in str(node.target)]


def test_the_compiler_can_tell_rewritings_apart():
    assert JoinProducts().uuid() == JoinProducts().uuid()

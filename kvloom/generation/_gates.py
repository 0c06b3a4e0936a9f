"""Gated feed-forward layers of a compiled step: their first half becomes one `Backend.gated_product`."""

from __future__ import annotations

from operator import getitem
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, called, is_call, is_tensor, tidy, uncast, viewed


class JoinGates(Rewriting):
    """The first half of a gated feed-forward layer becomes one product, behind `JoinProducts`.

    ``silu(x @ gate.T) * (x @ up.T)`` is a launch less, and half of the numbers are never written. Other activations are
    left as they are.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        for product in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            found = [_parts(*factors) for factors in (product.args, product.args[::-1])]
            if parts := next(filter(None, found), None):
                _join(product, *parts)
        tidy(graph)


class _Half(NamedTuple):
    """The part of a product that a weight's features ``[first, end)`` make."""

    product: Node
    weight: Node
    first: int
    end: int


def _parts(activated: Any, raised: Any) -> tuple[_Half, _Half] | None:
    """What a product is of, gate first."""
    gated = _silu_of(activated)
    if gated is None or not isinstance(raised, Node):
        return None
    gate: Any = viewed(gated)
    up = viewed(raised)
    if not is_call(gate, getitem) or not is_call(up, getitem) or set(gate.all_input_nodes[0].users) != {gate, up}:
        return None
    halves = [_split_half(each) or _whole_half(each) for each in (gate, up)]
    if halves[0] is None or halves[1] is None or halves[0].product is not halves[1].product:
        return None
    return (halves[0], halves[1]) if _width(halves[0]) == _width(halves[1]) else None


def _width(half: _Half) -> int:
    return half.end - half.first


def _whole_half(part: Any) -> _Half | None:
    """All of one weight's, without a bias."""
    products: Any = part.args[0]
    if not is_call(products, torch.ops.kvloom.products.default):
        return None
    each: Any = products.args[1:]
    weight, bias = (it[part.args[1]] for it in each)
    if bias is not None:
        return None
    return _Half(products, weight, 0, weight.meta["val"].shape[0])


def _split_half(part: Any) -> _Half | None:
    """Half of a weight that is both, as in Phi 3."""
    split: Any = part.args[0]
    if not is_call(split, aten.split.Tensor):
        return None
    parts: Any = split.args
    (halves, size, *dim), index = parts, part.args[1]
    if dim not in ([-1], [halves.meta["val"].dim() - 1]):
        return None
    whole = viewed(halves)
    both = _whole_half(whole) if is_call(whole, getitem) and _has_one_user(whole, split) else None
    return both and both._replace(first=index * size, end=min(both.end, (index + 1) * size))


def _has_one_user(node: Node, reader: Node) -> bool:
    """Whether nothing but the reader reads a node and its views."""
    while node is not reader and len(node.users) == 1:
        (node,) = node.users
    return node is reader


def _silu_of(activated: Any) -> Node | None:
    """``x`` of ``x / (1 + exp(-x))``, as the compiler writes ``silu``; 16-bit numbers are cast there and back."""
    if not is_tensor(activated):
        return None
    quotient = uncast(activated, activated.meta["val"].dtype)
    if not is_call(quotient, aten.div.Tensor):
        return None
    exact, below = quotient.args
    if not is_call(below, aten.add.Tensor) or below.args[1] != 1 or not is_call(below.args[0], aten.exp.default):
        return None
    minus = below.args[0].args[0]
    if not is_call(minus, aten.neg.default) or minus.args[0] is not exact:
        return None
    x = uncast(exact, minus.meta["val"].dtype)
    return x if x is not None and x.meta["val"].dtype is activated.meta["val"].dtype else None


def _join(product: Node, gate: _Half, up: _Half) -> None:
    value, graph = product.meta["val"], product.graph
    x: Any = gate.product.args[0]
    rows = value.new_empty((x.meta["val"].shape[0], value.shape[-1]))
    with graph.inserting_before(product):
        weights = [_weight(half) for half in (gate, up)]
        joined = called(graph, torch.ops.kvloom.gated_product.default, x, *weights, value=rows)
        own = called(graph, aten.reshape.default, joined, [*value.shape], value=value)
    product.replace_all_uses_with(own)


def _weight(half: _Half) -> Node:
    whole = half.weight.meta["val"]
    if _width(half) == whole.shape[0]:
        return half.weight
    args = half.weight, 0, half.first, half.end
    return called(half.weight.graph, aten.slice.Tensor, *args, value=whole[half.first : half.end])

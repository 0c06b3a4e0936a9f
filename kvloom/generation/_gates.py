"""Gated feed-forward layers of a compiled step: their first half becomes one `Backend.gated_product`."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, called, is_call, tidy, uncast, viewed


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


def _parts(activated: Any, raised: Any) -> tuple[Node, Node, Node] | None:
    """Rows and weights of a product, gate's first."""
    gated = _silu_of(activated)
    if gated is None or not isinstance(raised, Node):
        return None
    gate, up = viewed(gated), viewed(raised)
    if not is_call(gate, getitem) or not is_call(up, getitem) or gate.args[0] is not up.args[0] or gate is up:
        return None
    if gate.meta["val"].shape != up.meta["val"].shape:
        return None
    products: Any = gate.args[0]
    if not is_call(products, torch.ops.kvloom.products.default) or set(products.users) != {gate, up}:
        return None
    x, weights = products.args
    return x, weights[gate.args[1]], weights[up.args[1]]  # type: ignore[return-value, index]


def _silu_of(activated: Any) -> Node | None:
    """``x`` of ``x / (1 + exp(-x))``, as the compiler writes ``silu``; 16-bit numbers are cast there and back."""
    if not isinstance(activated, Node) or not isinstance(activated.meta["val"], torch.Tensor):
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


def _join(product: Node, x: Node, gate: Node, up: Node) -> None:
    value, graph = product.meta["val"], product.graph
    rows = value.new_empty((x.meta["val"].shape[0], value.shape[-1]))
    with graph.inserting_before(product):
        joined = called(graph, torch.ops.kvloom.gated_product.default, x, gate, up, value=rows)
        own = called(graph, aten.reshape.default, joined, [*value.shape], value=value)
    product.replace_all_uses_with(own)

"""Products of a compiled decode step with weights: those that share their rows become one `Backend.products`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, called, is_call, is_input, viewed
from kvloom.kernels import PRODUCT_ROWS, PRODUCT_WEIGHTS


class JoinProducts(Rewriting):
    """Products with weights that share their rows become one, see `Backend.products`.

    Query, key and value, or gate and up: a weight of few features alone leaves most of a GPU idle. Products of more
    than 8 rows are left as they are, cuBLAS being as fast there.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        sharing: dict[tuple[Node, int], list[_Product]] = {}
        for node in graph.nodes:
            if product := _product_of(node):
                # All that view one thing as so many rows are the same.
                sharing.setdefault((viewed(product.rows), node.meta["val"].shape[0]), []).append(product)
        for products in sharing.values():
            for first in range(0, len(products), PRODUCT_WEIGHTS):
                _join(graph, products[first : first + PRODUCT_WEIGHTS])


class _Product(NamedTuple):
    node: Node
    weight: Node
    bias: Node | None

    @property
    def rows(self) -> Node:
        """What is multiplied; another node when the product that it was has been joined."""
        rows = self.node.args[-2]
        assert isinstance(rows, Node)
        return rows


def _product_of(node: Node) -> _Product | None:
    """The parts of a linear layer's product of few rows, whose weight and bias are inputs of the graph."""
    is_biased = is_call(node, aten.addmm.default) and not node.kwargs
    if not is_biased and not is_call(node, aten.mm.default):
        return None
    transposed: Any = node.args[-1]
    bias: Any = node.args[0] if is_biased else None
    if not _is_few(node.meta["val"].shape[0]) or not is_call(transposed, aten.permute.default):
        return None
    if is_biased and (not is_input(bias) or bias.meta["val"].dim() != 1):
        return None
    weight, order = transposed.args
    return _Product(node, weight, bias) if is_input(weight) and order == [1, 0] else None


def _is_few(rows: object) -> bool:
    return isinstance(rows, int) and rows <= PRODUCT_ROWS  # a number that is not known is a symbol


def _join(graph: Graph, products: Sequence[_Product]) -> None:
    values = [product.node.meta["val"] for product in products]
    args = products[0].rows, [it.weight for it in products], [it.bias for it in products]
    with graph.inserting_before(products[0].node):
        joined = called(graph, torch.ops.kvloom.products.default, *args, value=values)
        for place, (product, value) in enumerate(zip(products, values, strict=True)):
            product.node.replace_all_uses_with(called(graph, getitem, joined, place, value=value))
    for product in products:
        graph.erase_node(product.node)

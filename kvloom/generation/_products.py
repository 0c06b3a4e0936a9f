"""Products of a compiled decode step with weights: those that share their rows become one `Backend.products`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

import torch
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, called, is_call, is_input, viewed
from kvloom.kernels import PRODUCT_ROWS, PRODUCT_WEIGHTS


class JoinProducts(Rewriting):
    """Products with weights that share their rows become one, see `Backend.products`.

    Query, key and value, or gate and up: a weight of few features alone leaves most of a GPU idle. Products of more
    than 8 rows are left as they are, cuBLAS being as fast there, and those with a bias, too.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        sharing: dict[tuple[Node, int], list[Node]] = {}
        for product in graph.find_nodes(op="call_function", target=aten.mm.default):
            rows = product.all_input_nodes[0]
            count = rows.meta["val"].shape[0]
            if _weight_of(product) is not None and _is_few(count):
                # All that view one thing as so many rows are the same.
                sharing.setdefault((viewed(rows), count), []).append(product)
        for products in sharing.values():
            for first in range(0, len(products), PRODUCT_WEIGHTS):
                _join(graph, products[first : first + PRODUCT_WEIGHTS])


def _is_few(rows: object) -> bool:
    return isinstance(rows, int) and rows <= PRODUCT_ROWS  # a number that is not known is a symbol


def _weight_of(product: Node) -> Node | None:
    """The second factor before it was transposed, if it is an input of the graph, as a linear layer's weight is."""
    transposed = product.args[1]
    if not is_call(transposed, aten.permute.default):
        return None
    weight, order = transposed.args
    return weight if is_input(weight) and order == [1, 0] else None


def _join(graph: Graph, products: Sequence[Node]) -> None:
    values = [product.meta["val"] for product in products]
    rows = products[0].args[0]  # by now maybe of a product that was joined
    with graph.inserting_before(products[0]):
        joined = called(graph, torch.ops.kvloom.products.default, rows, [*map(_weight_of, products)], value=values)
        for place, (product, value) in enumerate(zip(products, values, strict=True)):
            product.replace_all_uses_with(called(graph, getitem, joined, place, value=value))
    for product in products:
        graph.erase_node(product)

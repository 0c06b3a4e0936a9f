"""Products of a compiled decode step with weights: those that share their rows become one `Backend.products`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from kvloom.kernels import PRODUCT_ROWS, PRODUCT_WEIGHTS

_VIEWS = torch.ops.aten.view.default, torch.ops.aten.reshape.default


class JoinProducts(CustomGraphPass):
    """A pass of torch's compiler over the graph that it is about to lower.

    Query, key and value, or gate and up: a weight of few features alone leaves most of a GPU idle. Products of more
    than 8 rows are left as they are, cuBLAS being as fast there, and those with a bias, too.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        sharing: dict[tuple[Node, int], list[Node]] = {}
        for product in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            rows = product.all_input_nodes[0]
            count = rows.meta["val"].shape[0]
            if _weight_of(product) is not None and _is_few(count):
                sharing.setdefault((_viewed(rows), count), []).append(product)
        for products in sharing.values():
            for first in range(0, len(products), PRODUCT_WEIGHTS):
                _join(graph, products[first : first + PRODUCT_WEIGHTS])

    def uuid(self) -> Any:
        """Of this rewriting, for the compiler's cache."""
        return get_hash_for_files((__file__,))


def _is_few(rows: object) -> bool:
    return isinstance(rows, int) and rows <= PRODUCT_ROWS  # a number that is not known is a symbol


def _viewed(rows: Node) -> Node:
    """What rows are a view of; all that view one thing as so many rows are the same."""
    while rows.target in _VIEWS:
        rows = rows.all_input_nodes[0]
    return rows


def _weight_of(product: Node) -> Node | None:
    """The second factor before it was transposed, if it is an input of the graph, as a linear layer's weight is."""
    transposed = product.args[1]
    if not isinstance(transposed, Node) or transposed.target is not torch.ops.aten.permute.default:
        return None
    weight, order = transposed.args
    if not isinstance(weight, Node) or weight.op not in ("placeholder", "get_attr") or order != [1, 0]:
        return None
    return weight


def _join(graph: Graph, products: Sequence[Node]) -> None:
    values = [product.meta["val"] for product in products]
    rows = products[0].args[0]  # by now maybe of a product that was joined
    with graph.inserting_before(products[0]):
        joined = graph.call_function(torch.ops.kvloom.products.default, (rows, [*map(_weight_of, products)]))
        joined.meta["val"] = values
        for place, (product, value) in enumerate(zip(products, values, strict=True)):
            own = graph.call_function(getitem, (joined, place))
            own.meta["val"] = value
            product.replace_all_uses_with(own)
    for product in products:
        graph.erase_node(product)

"""Sums over ranks in a compiled decode step: small ones become `Backend.sum_ranks`."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, called
from kvloom.kernels import SUM_NBYTES


class SumRanks(Rewriting):
    """Sums over ranks of few bytes become ours, see `Backend.sum_ranks`.

    Tensor parallelism has two sums a layer, of a few rows, in which NCCL takes longer to begin than to move them. Every
    one is an `all_reduce` that is waited for at once; larger ones are left as they are.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        collectives = torch.ops._c10d_functional
        for waited in graph.find_nodes(op="call_function", target=collectives.wait_tensor.default):
            total = waited.args[0]
            if total.target is collectives.all_reduce.default and len(total.users) == 1 and _is_small_sum(total):
                _replace(graph, total, waited)


def _is_small_sum(total: Node) -> bool:
    _, kind, group_name = total.args
    value = total.meta["val"]
    sizes = [value.itemsize, *value.shape]
    if kind != "sum" or not isinstance(group_name, str) or not all(isinstance(size, int) for size in sizes):
        return False  # a size that is not known is a symbol
    return bool(value.numel() * value.itemsize <= SUM_NBYTES)


def _replace(graph: Graph, total: Node, waited: Node) -> None:
    addend, _, group_name = total.args
    with graph.inserting_before(total):
        ours = called(graph, torch.ops.kvloom.sum_ranks.default, addend, group_name, value=waited.meta["val"])
    waited.replace_all_uses_with(ours)
    graph.erase_node(waited)
    graph.erase_node(total)

"""Norms of a compiled step: a residual connection and the norm behind it become one `Backend.add_norm`."""

from __future__ import annotations

from math import prod
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, called, is_call, is_input, is_tensor, tidy, uncast, viewed

_READERS = torch.ops.kvloom.products.default, torch.ops.kvloom.gated_product.default


class JoinNorms(Rewriting):
    """A residual connection and the norm behind it become one, behind the other rewritings.

    Norms that a product of ours reads (`JoinProducts`, `JoinGates`): a launch of ours begins while the one before it is
    ending, which one of torch's would wait for. A sum over ranks (`SumRanks`) of what is added becomes part of it.
    RMSNorm as Llama has it; others are left as they are.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        for target in _READERS:
            for reader in graph.find_nodes(op="call_function", target=target):
                if norm := _norm_of(viewed(reader.args[0])):
                    _join(norm)
        tidy(graph)


class _Norm(NamedTuple):
    added: Node
    scaled: Node
    weight: Node
    eps: float


def _norm_of(scaled: Any) -> _Norm | None:
    """The parts of ``weight * (h / sqrt(mean(h^2) + eps))`` of a sum ``h``, in fp32 up to the weight."""
    if not is_call(scaled, aten.mul.Tensor):
        return None
    weight, unit = _ordered(scaled, is_input)
    exact, root = _ordered(uncast(unit, scaled.meta["val"].dtype), lambda it: not is_call(it, aten.rsqrt.default))
    if not is_input(weight) or weight.meta["val"].shape != scaled.meta["val"].shape[-1:]:
        return None
    if not is_call(root, aten.rsqrt.default) or not is_tensor(exact) or exact.meta["val"].dtype is not torch.float32:
        return None
    within: Any = root.args[0]
    if not is_call(within, aten.add.Tensor):
        return None
    mean, eps = within.args
    if not isinstance(eps, float) or not is_call(mean, aten.mean.dim) or mean.args[1:] != ([-1], True):
        return None
    square, added = mean.args[0], uncast(exact, torch.float32)
    if not is_call(square, aten.pow.Tensor_Scalar) or square.args != (exact, 2):
        return None
    if not is_call(added, aten.add.Tensor) or added.kwargs or not _are_alike(scaled, added, *added.args):
        return None
    return _Norm(added, scaled, weight, eps)


def _ordered(product: Any, comes_first: Any) -> tuple[Any, Any]:
    """The two factors of a product."""
    if not is_call(product, aten.mul.Tensor):
        return None, None
    first, second = product.args
    return (first, second) if comes_first(first) else (second, first)


def _are_alike(*nodes: Any) -> bool:
    """Whether these are tensors of one shape and dtype."""
    values = [node.meta["val"] for node in nodes if is_tensor(node)]
    return len(values) == len(nodes) and len({(it.shape, it.dtype) for it in values}) == 1


def _join(norm: _Norm) -> None:
    added, graph = norm.added, norm.added.graph
    value = added.meta["val"]
    shape = [prod(value.shape[:-1]), value.shape[-1]]
    residual, x = sorted(added.args, key=_is_sum)
    addend, group_name = viewed(x).args if _is_sum(x) else (x, None)  # type: ignore[arg-type]
    two = [value.new_empty(shape) for _ in range(2)]
    with graph.inserting_before(added.next):
        rows = [called(graph, aten.reshape.default, it, shape, value=two[0]) for it in (addend, residual)]
        args = (*rows, norm.weight, norm.eps, group_name)
        joined = called(graph, torch.ops.kvloom.add_norm.default, *args, value=tuple(two))
        parts = [called(graph, getitem, joined, i, value=two[i]) for i in range(2)]
        stream, scaled = (called(graph, aten.reshape.default, it, [*value.shape], value=value) for it in parts)
    norm.scaled.replace_all_uses_with(scaled)
    added.replace_all_uses_with(stream)


def _is_sum(node: Any) -> bool:
    """Whether this is a sum over ranks that nothing else reads."""
    while isinstance(node, Node) and len(node.users) == 1:
        if is_call(node, torch.ops.kvloom.sum_ranks.default):
            return True
        if viewed(node) is node:
            return False
        node = node.all_input_nodes[0]
    return False

"""What rewritings of a compiled step's graph have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

aten = torch.ops.aten
_VIEWS = aten.view.default, aten.reshape.default
_CAST = torch.ops.prims.convert_element_type.default


class Rewriting(CustomGraphPass):
    """A pass of torch's compiler over the graph that it is about to lower."""

    def uuid(self) -> Any:
        """Of this rewriting, for the compiler's cache."""
        return get_hash_for_files((inspect.getfile(type(self)), __file__))


def viewed(node: Node) -> Node:
    """What a node is a view of, in another shape."""
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def is_call(node: Any, target: Any) -> TypeGuard[Node]:
    """Whether this is a node that calls this operator."""
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def is_input(node: Any) -> TypeGuard[Node]:
    """Whether this is an input of the graph, as a weight is."""
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")


def is_tensor(node: Any) -> TypeGuard[Node]:
    """Whether this is a node whose value is a tensor: factors and addends may be numbers."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def uncast(node: Any, dtype: torch.dtype) -> Node | None:
    """What was cast to a dtype, or had it already."""
    if is_call(node, _CAST):
        inner: Any = node.args[0] if node.args[1] is dtype else None
        return inner if isinstance(inner, Node) else None
    return node if is_tensor(node) and node.meta["val"].dtype is dtype else None


def called(graph: Graph, target: Any, *args: Any, value: Any) -> Node:
    """A call added to a graph where it stands, and what it returns, as fake tensors."""
    made = graph.call_function(target, args)
    made.meta["val"] = value
    return made


def give(node: Node, parts: Mapping[int | str, Node]) -> None:
    """Give a call other arguments, by place or by name.

    The compiler keeps the values of operators' arguments as they were first traced, and goes by those.
    """
    node.args, node.kwargs = _changed(node.args, node.kwargs, parts)
    if eager := node.meta.get("eager_input_vals"):
        args, kwargs = eager
        values = {at: part.meta["val"] for at, part in parts.items()}
        node.meta["eager_input_vals"] = _changed(args, kwargs, values)


def _changed(args: Sequence[Any], kwargs: Mapping[Any, Any], parts: Mapping[int | str, Any]) -> tuple[Any, Any]:
    every: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs, **parts}
    return tuple(every[place] for place in range(len(args))), {name: every[name] for name in kwargs}


def tidy(graph: Graph) -> None:
    """Bring nodes behind what they read, wherever they were added, and drop what nothing reads."""
    stable_topological_sort(graph)
    graph.eliminate_dead_code()

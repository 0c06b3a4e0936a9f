"""Rotary positions of a compiled step: appending a key and attending with a query turn them, too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, give, is_call, is_tensor, tidy

_APPEND, _ATTEND = torch.ops.kvloom.append.default, torch.ops.kvloom.attend_static.default
_PLACES = {argument.name: place for place, argument in enumerate(_ATTEND._schema.arguments)}


class JoinRopes(Rewriting):
    """Rotary positions of a layer's query and key become those that `Backend.attend_static` and `Backend.append` know.

    Two launches less. Halves of a head's channels are turned against each other, as in Llama; other ways are left as
    they are.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        for attend in graph.find_nodes(op="call_function", target=_ATTEND):
            if rope := _rope_of(attend.args[_PLACES["query"]]):
                give(attend, {_PLACES["query"]: rope.x, _PLACES["cos"]: rope.cos, _PLACES["sin"]: rope.sin})
        for append in graph.find_nodes(op="call_function", target=auto_functionalized_v2):
            if append.args[0] is _APPEND and (rope := _rope_of(append.kwargs["key"])):
                give(append, {"key": rope.x, "cos": rope.cos, "sin": rope.sin})
        tidy(graph)


class _Rope(NamedTuple):
    x: Node
    cos: Node
    sin: Node


def _rope_of(turned: Any) -> _Rope | None:
    """The parts of ``x * cos + cat([-x[..., half:], x[..., :half]]) * sin``."""
    if not is_call(turned, aten.add.Tensor) or not all(is_call(it, aten.mul.Tensor) for it in turned.args):
        return None
    factors: Any = [it.args for it in turned.args]  # type: ignore[union-attr]
    (x, of_x), (halves, of_halves) = factors
    if not is_call(halves, aten.cat.default) or halves.args[1:] not in ((-1,), (3,)):
        return None
    cos, sin = _of_all_heads(of_x), _of_all_heads(of_halves)
    if not is_tensor(x) or cos is None or sin is None:
        return None
    parts: Any = halves.args[0]
    if len(parts) != 2:
        return None
    minus, low = parts
    high = minus.args[0] if is_call(minus, aten.neg.default) else None
    if not is_call(low, aten.slice.Tensor) or not is_call(high, aten.slice.Tensor):
        return None
    tokens, dim = x.meta["val"].shape[2:]
    end: Any = high.args[3] if len(high.args) > 3 else dim
    is_half = low.args == (x, 3, 0, dim // 2) and high.args[:3] == (x, 3, dim // 2) and end >= dim
    is_one = tokens == 1 and all(it.meta["val"].shape[1:] == (1, dim) for it in (cos, sin))
    is_alike = all(it.meta["val"].dtype is x.meta["val"].dtype for it in (cos, sin))
    return _Rope(x, cos, sin) if is_half and is_one and is_alike else None


def _of_all_heads(angles: Any) -> Node | None:
    """What had no heads before: of a view, the compiler makes a copy for every layer."""
    is_view = is_call(angles, aten.unsqueeze.default) and angles.args[1] == 1
    inner: Any = angles.args[0] if is_view else None
    return inner if is_tensor(inner) else None

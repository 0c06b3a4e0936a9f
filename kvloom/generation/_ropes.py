"""Rotary positions of a compiled step: those of a layer's query and key become one `Backend.rope`."""

from __future__ import annotations

from operator import getitem
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node

from kvloom.generation._graphs import Rewriting, aten, called, is_call, is_tensor, tidy

_ATTEND = torch.ops.kvloom.attend_static.default
_TAIL_KEY = [argument.name for argument in _ATTEND._schema.arguments].index("tail_key")


class JoinRopes(Rewriting):
    """Rotary positions of a layer's query and key become one.

    One launch in place of two, and one of ours begins while the one before it is ending. Halves of a head's channels
    are turned against each other, as in Llama; other ways are left as they are.
    """

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        for attend in graph.find_nodes(op="call_function", target=_ATTEND):
            append = _append_of(attend)
            query, key = _rope_of(_unturned(attend.args[0])), _rope_of(append and append.kwargs["key"])
            if append and query and key and query[2:] == key[2:]:
                _join(append, query, key)
        tidy(graph)


class _Rope(NamedTuple):
    turned: Node
    x: Node
    cos: Node
    sin: Node


def _append_of(attend: Node) -> Node | None:
    """What appended the token that attention reads last, whose tail it has."""
    tail: Any = attend.args[_TAIL_KEY]
    made: Any = tail.args[0] if is_call(tail, getitem) else None
    is_append = is_call(made, auto_functionalized_v2) and made.args[0] is torch.ops.kvloom.append.default
    return made if is_append else None


def _rope_of(turned: Any) -> _Rope | None:
    """The parts of ``x * cos + cat([-x[..., half:], x[..., :half]]) * sin``."""
    if not is_call(turned, aten.add.Tensor) or not all(is_call(it, aten.mul.Tensor) for it in turned.args):
        return None
    factors: Any = [it.args for it in turned.args]  # type: ignore[union-attr]
    (x, cos), (halves, sin) = factors
    if not is_call(halves, aten.cat.default) or halves.args[1:] not in ((-1,), (3,)):
        return None
    if not all(map(is_tensor, (x, cos, sin))):
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
    is_one = tokens == 1 and all(it.meta["val"].shape[1:] == (1, 1, dim) for it in (cos, sin))
    return _Rope(turned, x, cos, sin) if is_half and is_one else None


def _unturned(query: Any) -> Any:
    """A query before it was turned like the keys that it meets."""
    return query.args[0] if is_call(query, torch.ops.kvloom.turn.default) else query


def _join(append: Node, query: _Rope, key: _Rope) -> None:
    graph = append.graph
    like = [it.x.meta["val"].new_empty(it.x.meta["val"].shape) for it in (query, key)]
    with graph.inserting_before(append):
        joined = called(graph, torch.ops.kvloom.rope.default, query.x, key.x, query.cos, query.sin, value=tuple(like))
        own = [called(graph, getitem, joined, i, value=like[i]) for i in range(2)]
    for it, made in zip((query, key), own, strict=True):
        it.turned.replace_all_uses_with(made)

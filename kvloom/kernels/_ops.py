"""The operations of decode steps as torch operators, so that torch.compile and CUDA graphs take them whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvloom.kernels._base import AttendOptions
from kvloom.kernels._registry import backend
from kvloom.kernels._turns import Rope
from kvloom.pages import ExactKV, HeadPages, KeptRecords, StaticKV, layouts_of

# Else the compiler copies angles, which it has no reason to keep, for each of their uses.
_ANY_STRIDES = (torch.Tag.flexible_layout,)
_CHANGED = ("pages", "sink_key", "sink_value", "tail_key", "tail_value", "state", "flags")
_APPEND = """(
    Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor(a!)[] pages, Tensor(b!) sink_key, Tensor(c!) sink_value,
    Tensor(d!) tail_key, Tensor(e!) tail_value, Tensor(f!) state, Tensor(g!) flags, Tensor filled, Tensor? table,
    Tensor? places, Tensor[] extents, Tensor[] page_places, int page_tokens, str layouts
) -> ()"""
_ATTEND = """(
    Tensor query, Tensor? cos, Tensor? sin, float scaling, Tensor? mask, float? softcap, Tensor? sink_logits,
    Tensor? query_turn, Tensor? output_turn, Tensor[] pages, Tensor sink_key, Tensor sink_value, Tensor tail_key,
    Tensor tail_value, Tensor state, Tensor flags, Tensor filled, Tensor? table, Tensor? places, Tensor[] extents,
    Tensor[] page_places, int page_tokens, str layouts
) -> Tensor"""


def append(key: torch.Tensor, value: torch.Tensor, kv: StaticKV) -> None:
    """`Backend.append`, by the backend of the device."""
    torch.ops.kvloom.append(key, value, None, None, *_parts(kv))


def attend_static(
    query: torch.Tensor,
    kv: StaticKV,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Backend.attend_static`, by the backend of the device."""
    options = (scaling, mask, softcap, sink_logits)
    turns = (kv.query_turn, kv.output_turn)
    out: torch.Tensor = torch.ops.kvloom.attend_static(query, None, None, *options, *turns, *_parts(kv))
    return out


def _parts(kv: StaticKV) -> tuple[Any, ...]:
    exact = (kv.sinks.key, kv.sinks.value, kv.tail.key, kv.tail.value)
    kept = [g.kept for g in kv.pages if g.kept is not None]
    places = (kv.places, [part.extents for part in kept], [part.places for part in kept])
    data = [g.data for g in kv.pages]
    return (data, *exact, kv.state, kv.flags, kv.filled, kv.table, *places, kv.page_tokens, kv.layouts)


def _whole(
    pages: list[torch.Tensor],
    sink_key: torch.Tensor,
    sink_value: torch.Tensor,
    tail_key: torch.Tensor,
    tail_value: torch.Tensor,
    state: torch.Tensor,
    flags: torch.Tensor,
    filled: torch.Tensor,
    table: torch.Tensor | None,
    places: torch.Tensor | None,
    extents: list[torch.Tensor],
    page_places: list[torch.Tensor],
    page_tokens: int,
    layouts: str,
    **turns: torch.Tensor | None,
) -> StaticKV:
    known = layouts_of(layouts, tail_key.shape[-1], tail_key.itemsize, page_tokens)
    kept: Sequence[KeptRecords | None]
    kept = [KeptRecords(*each) for each in zip(extents, page_places, strict=True)] or [None] * len(pages)
    groups = tuple(HeadPages(*of, data, own) for of, data, own in zip(known, pages, kept, strict=True))
    sinks, tail = ExactKV(sink_key, sink_value), ExactKV(tail_key, tail_value)
    return StaticKV(groups, sinks, tail, state, flags, filled, page_tokens, table, places=places, **turns)


def _rope(cos: torch.Tensor | None, sin: torch.Tensor | None) -> Rope | None:
    return None if cos is None or sin is None else (cos, sin)


@torch.library.custom_op("kvloom::append", mutates_args=_CHANGED, schema=_APPEND, tags=_ANY_STRIDES)
def _append(
    key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, *parts: Any
) -> None:
    backend(key.device).append(key, value, _whole(*parts), _rope(cos, sin))


@torch.library.custom_op("kvloom::attend_static", mutates_args=(), schema=_ATTEND, tags=_ANY_STRIDES)
def _attend_static(
    query: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    query_turn: torch.Tensor | None,
    output_turn: torch.Tensor | None,
    *parts: Any,
) -> torch.Tensor:
    kv = _whole(*parts, query_turn=query_turn, output_turn=output_turn)
    options: AttendOptions = {"scaling": scaling, "mask": mask, "softcap": softcap, "sink_logits": sink_logits}
    return backend(query.device).attend_static(query, kv, _rope(cos, sin), **options)


@_attend_static.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, queries, dim = query.shape
    return query.new_empty((batch, queries, heads, dim))


@torch.library.custom_op(
    "kvloom::products", mutates_args=(), schema="(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]"
)
def _products(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return backend(x.device).products(x, weights, biases)


@_products.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


@torch.library.custom_op("kvloom::sum_ranks", mutates_args=(), schema="(Tensor x, str group_name) -> Tensor")
def _sum_ranks(x: torch.Tensor, group_name: str) -> torch.Tensor:
    return backend(x.device).sum_ranks(x, group_name)


@_sum_ranks.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "kvloom::gated_product", mutates_args=(), schema="(Tensor x, Tensor gate, Tensor up) -> Tensor"
)
def _gated_product(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return backend(x.device).gated_product(x, gate, up)


@_gated_product.register_fake
def _(x: torch.Tensor, gate: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], gate.shape[0]))


@torch.library.custom_op(
    "kvloom::add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, str? group_name) -> (Tensor, Tensor)",
)
def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group_name: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return backend(x.device).add_norm(x, residual, weight, eps, group_name)


@_add_norm.register_fake
def _(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)

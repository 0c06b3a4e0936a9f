"""Caches of fixed size by the other operations of a backend: the reference, which reads the fill levels on the host."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from kvloom.pages import Role, StaticKV

if TYPE_CHECKING:
    from kvloom.kernels._base import AttendOptions, Backend


def append_by_sequence(backend: Backend, key: torch.Tensor, value: torch.Tensor, kv: StaticKV) -> None:
    """See `Backend.append`. Fill levels grow last: what `Backend.encode` refuses is not counted as appended."""
    key, value = turned_token(backend, key, kv, "key"), turned_token(backend, value, kv, "value")
    for rows, tokens, _ in _runs(kv):
        if tokens >= kv.length:
            kv.flags[1] = 1
            continue
        _write(key, value, kv, rows, tokens)
        page, pages = kv.filled[tokens : tokens + 2].tolist()
        if pages > page:
            _pack(backend, kv, rows, page)
        kv.levels()[rows] = torch.tensor([tokens + 1, page], dtype=torch.int32, device=kv.device)


def attend_by_sequence(backend: Backend, query: torch.Tensor, kv: StaticKV, options: AttendOptions) -> torch.Tensor:
    """See `Backend.attend_static`."""
    mask = options.get("mask")
    out = []
    for rows, tokens, pages in _runs(kv):
        if mask is not None:
            slots = tokens if kv.places is None else mask.shape[-1]
            options = {**options, "mask": mask.expand(len(query), -1, -1, -1)[rows, ..., :slots]}
        out.append(backend.attend(query[rows], kv.paged(rows, tokens, pages), **options))
    return torch.cat(out)


def _runs(kv: StaticKV) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring sequences of equal levels, with their tokens and pages."""
    start = 0
    for (tokens, pages), run in groupby(kv.levels().tolist()):
        stop = start + len(list(run))
        yield slice(start, stop), tokens, pages
        start = stop


def turned_token(backend: Backend, x: torch.Tensor, kv: StaticKV, role: Role) -> torch.Tensor:
    """The token ``[batch, kv_heads, 1, head_dim]`` as it is cached, as far as its layouts say."""
    heads = [
        head for group in kv.pages if getattr(group.layout, role).fmt.rotation == "hadamard" for head in group.heads
    ]
    if len(heads) == x.shape[1]:
        return backend.rotate(x)
    return x.index_copy(1, torch.tensor(heads, device=x.device), backend.rotate(x[:, heads])) if heads else x


def _write(key: torch.Tensor, value: torch.Tensor, kv: StaticKV, rows: slice, tokens: int) -> None:
    at = tokens - kv.sinks.tokens
    into, slot = (kv.sinks, tokens) if at < 0 else (kv.tail, at % kv.tail.tokens)
    into.key[rows, :, slot] = key[rows, :, 0]
    into.value[rows, :, slot] = value[rows, :, 0]


def _pack(backend: Backend, kv: StaticKV, rows: slice, page: int) -> None:
    slots = kv.ring_slots(page * kv.page_tokens, (page + 1) * kv.page_tokens)
    for group in kv.pages:
        key, value = (x[rows][:, list(group.heads)][:, :, slots] for x in (kv.tail.key, kv.tail.value))
        kv.store(group, rows, page, backend.encode(key, value, group.layout))

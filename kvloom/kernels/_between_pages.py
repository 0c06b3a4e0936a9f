"""Steps through caches of fixed size that fill no page: fill levels stay on the device, so that graphs can hold them.

Packing a page is the only thing in a step that happens at some steps and not at others. Whoever knows on the host that
a step packs none (`LoomCache.waits_at`) says so by `between_pages`, and the reference's operations then launch the same
at every step: the token is written where the device knows, and attention reads all there is room for, masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from kvloom.kernels._static import turned_token
from kvloom.pages import StaticKV, places

if TYPE_CHECKING:
    from kvloom.kernels._base import Backend

_IS_ON = ContextVar("between_pages", default=False)


@contextmanager
def between_pages() -> Iterator[None]:
    """Within it, no step fills a page, a sink or the last slot of a cache of fixed size."""
    token = _IS_ON.set(True)
    try:
        yield
    finally:
        _IS_ON.reset(token)


def is_between_pages() -> bool:
    """Whether `between_pages` is in force."""
    return _IS_ON.get()


def append_token(backend: Backend, key: torch.Tensor, value: torch.Tensor, kv: StaticKV) -> None:
    """`Backend.append` between pages."""
    levels = kv.levels()
    tokens = levels[:, 0].long()
    row = torch.arange(len(tokens), device=kv.device)
    slot = (tokens - kv.sinks.tokens) % kv.tail.tokens
    kv.tail.key[row, :, slot] = turned_token(backend, key, kv, "key")[:, :, 0]
    kv.tail.value[row, :, slot] = turned_token(backend, value, kv, "value")[:, :, 0]
    levels[:, 1] = kv.filled[tokens]
    levels[:, 0] += 1


def mask_of_room(kv: StaticKV, mask: torch.Tensor | None, query_heads: int) -> torch.Tensor:
    """Which of all columns [sinks, ring, records] the newest token reads, by fill level and by the caller's mask.

    Args:
        kv: The cache, of one layout.
        mask: None, or ``[batch or 1, heads or 1, 1, slots or places]``, boolean or additive.
        query_heads: Query heads.

    Returns:
        ``[batch, query_heads or 1, 1, columns]``, boolean or additive.
    """
    tokens, pages = kv.levels().long().unsqueeze(-1).unbind(1)
    slots, held = _exact_columns(kv, tokens, pages)
    at, reads = (_slot_columns if kv.places is None else _place_columns)(kv, slots, held, pages)
    if at.shape[1] > 1:
        at, reads = (x.repeat_interleave(query_heads // x.shape[1], dim=1) for x in (at, reads))
    at, reads = at[:, :, None], reads[:, :, None]
    if mask is None:
        return reads
    heads = max(at.shape[1], mask.shape[1])
    of_heads = mask.expand(len(at), heads, -1, -1)
    chosen = of_heads.gather(-1, at.clamp(0, mask.shape[-1] - 1).expand(-1, heads, -1, -1))
    return chosen & reads if mask.dtype == torch.bool else chosen.masked_fill(~reads, torch.finfo(mask.dtype).min)


def _exact_columns(kv: StaticKV, tokens: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of sinks and ring, and whether they hold what is not in a page, ``[batch, columns]``."""
    sinks = torch.arange(kv.sinks.tokens, device=kv.device).expand(len(tokens), -1)
    newest = tokens - 1 - kv.sinks.tokens
    of_ring = newest - (newest - torch.arange(kv.tail.tokens, device=kv.device)) % kv.tail.tokens
    held = torch.cat([torch.ones_like(sinks, dtype=torch.bool), of_ring >= pages * kv.page_tokens], dim=-1)
    return torch.cat([sinks, of_ring + kv.sinks.tokens], dim=-1), held


def _slot_columns(
    kv: StaticKV, slots: torch.Tensor, held: torch.Tensor, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of all columns, and which are read, ``[batch, 1, columns]``."""
    packed = torch.arange(kv.num_pages * kv.page_tokens, device=kv.device).expand(len(slots), -1)
    reads = torch.cat([held, packed < pages * kv.page_tokens], dim=-1)
    return torch.cat([slots, packed + kv.sinks.tokens], dim=-1)[:, None], reads[:, None]


def _place_columns(
    kv: StaticKV, slots: torch.Tensor, held: torch.Tensor, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of all columns, and which are read, ``[batch, kv_heads, columns]``."""
    (kept,) = (group.kept for group in kv.pages)
    assert kv.places is not None
    assert kept is not None
    batch, heads, length = kv.places.shape
    exact = places(kv.places).gather(-1, slots[:, None].clamp(0, length - 1).expand(-1, heads, -1))
    of_records = places(kept.places).flatten(2).expand(batch, heads, -1)
    first, counts = kept.extents.long().unsqueeze(-1).unbind(2)
    record = torch.arange(kept.places.shape[2], device=kv.device)
    own = (record >= first) & (record < first + counts + pages[:, None])
    reads = torch.cat([held[:, None].expand(-1, heads, -1), own.repeat_interleave(kv.page_tokens, dim=-1)], dim=-1)
    return torch.cat([exact, of_records], dim=-1), reads

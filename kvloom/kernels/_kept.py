"""Pages of kept tokens for backends that read as many pages of every head: the reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvloom.pages import HeadPages, PagedKV, places


def padded(
    kv: PagedKV, mask: torch.Tensor | None, query_heads: int, queries: int
) -> tuple[PagedKV, torch.Tensor | None]:
    """A cache with `PagedKV.places` as one whose pages all have slots, and a mask by place as one by slot.

    Waits for the device, since the size is that of the head with the most pages.

    Args:
        kv: The cache.
        mask: None for causal, or ``[batch or 1, heads or 1, queries, places]``, boolean or additive.
        query_heads: Query heads.
        queries: Queries of this pass.

    Returns:
        The cache, and None for causal or ``[batch, query_heads, queries, slots]``.
    """
    counts = [_counts(group, kv.num_pages) for group in kv.pages]
    most = max(int(count.max()) for count in counts)
    pages, slots = zip(*(_rectangular(g, count, most) for g, count in zip(kv.pages, counts, strict=True)), strict=True)
    assert kv.places is not None
    exact = places(kv.places)
    sinks, tail = exact[..., : kv.sinks.tokens], exact[..., kv.length - kv.tail.tokens :]
    order = torch.tensor([head for group in kv.pages for head in group.heads], device=kv.device).argsort()
    at = torch.cat([sinks, torch.cat(slots, dim=1)[:, order].flatten(2), tail], dim=-1)
    whole = replace(
        kv,
        pages=pages,
        length=at.shape[-1],
        num_pages=most,
        visible=torch.full_like(kv.visible, most),
        places=None,
    )
    is_even = all(bool((count == most).all()) for count in counts)
    return whole, None if mask is None and is_even else _by_slot(mask, at, query_heads, queries)


def _counts(group: HeadPages, num_pages: int) -> torch.Tensor:
    assert group.kept is not None
    return group.kept.extents[..., 1].long() + num_pages


def _rectangular(group: HeadPages, counts: torch.Tensor, most: int) -> tuple[HeadPages, torch.Tensor]:
    """Pages of a group, some record in place of those that a head lacks; and their places, -1 where it lacks them."""
    assert group.kept is not None
    kept, lead = group.kept, counts.shape
    page = torch.arange(most, device=counts.device)
    lacks = page >= counts[..., None]
    index = (kept.extents[..., :1].long() + page).masked_fill(lacks, 0)
    if not group.data.shape[2]:
        data = group.data.new_zeros(*lead, most, group.layout.nbytes)
        at = index.new_zeros(*lead, most, group.layout.page_tokens)
    else:
        row, head = (torch.arange(n, device=counts.device) for n in lead)
        of_head = (row[:, None, None], head[:, None], index)
        data = group.data.expand(*lead, -1, -1)[of_head]
        at = places(kept.places.expand(*lead, -1, -1)[of_head])
    return HeadPages(group.heads, group.layout, data), at.masked_fill(lacks[..., None], -1)


def _by_slot(mask: torch.Tensor | None, slots: torch.Tensor, query_heads: int, queries: int) -> torch.Tensor:
    """`mask` for the tokens at ``slots [batch, kv_heads, tokens]``; -1 for nothing."""
    group = query_heads // slots.shape[1]
    if mask is None:
        own = slots[..., -queries:, None]
        return (slots[..., None, :].ge(0) & (slots[..., None, :] <= own)).repeat_interleave(group, dim=1)
    columns = slots.repeat_interleave(group, dim=1)[..., None, :].expand(-1, -1, queries, -1)
    chosen = mask.expand(len(slots), query_heads, -1, -1).gather(-1, columns.clamp_min(0))
    if mask.dtype == torch.bool:
        return chosen & (columns >= 0)
    return chosen.masked_fill(columns < 0, torch.finfo(chosen.dtype).min)

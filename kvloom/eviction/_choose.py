"""Which pages and which exact tokens stay, by their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chosen:
    """What stays of one layer.

    Attributes:
        pages: bool ``[batch, kv_heads, pages]``.
        order: int64 ``[batch, kv_heads, tail]``: exact tokens, those that stay first.
        counts: int64 ``[batch, kv_heads]``: how many of them stay; they differ by whole pages.
    """

    pages: torch.Tensor
    order: torch.Tensor
    counts: torch.Tensor


def choose(
    pages: torch.Tensor, tail: torch.Tensor, base: int, units: int, page_tokens: int, *, is_pooled: bool
) -> Chosen:
    """The ``base`` best exact tokens of every KV head, then the best units of a page.

    A unit is a page that is packed, or the ``page_tokens`` exact tokens that follow in the order of their scores; it is
    worth the sum of its tokens. Units are chosen for each head, or among all heads of a layer (``is_pooled``), which is
    the choice of the largest sum that whole pages allow.

    Args:
        pages: Scores of pages, fp64 ``[batch, kv_heads, pages]``; NaN where a head has no such page.
        tail: Scores of exact tokens, fp64 ``[batch, kv_heads, tail]``.
        base: Exact tokens of every head.
        units: Units of a head; of a layer they are ``kv_heads`` times as many.
        page_tokens: Tokens in a page.
        is_pooled: Whether heads compete.
    """
    ranked, order = tail.sort(dim=-1, descending=True, stable=True)
    blocks = ranked[..., base : base + (tail.shape[-1] - base) // page_tokens * page_tokens]
    blocks = blocks.unflatten(-1, (-1, page_tokens)).sum(-1) if blocks.shape[-1] else blocks
    worth = torch.cat([pages, blocks], dim=-1)
    competing = worth.flatten(1)[:, None] if is_pooled else worth
    best = (units * worth.shape[1]) if is_pooled else units
    # NaN sorts above all when descending: put what does not exist below the worst instead.
    exists = ~competing.isnan()
    places = torch.where(exists, competing, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = places.gather(-1, (~exists).gather(-1, places).long().argsort(dim=-1, stable=True))[..., :best]
    stays = torch.zeros_like(exists).scatter(-1, places, True) & exists
    stays = stays.view(worth.shape)
    count = pages.shape[-1]
    return Chosen(stays[..., :count], order, base + page_tokens * stays[..., count:].sum(-1))

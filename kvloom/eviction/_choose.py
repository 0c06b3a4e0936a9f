"""Which pages and which exact tokens stay, by their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chosen:
    """What stays of one layer.

    Attributes:
        pages: bool ``[batch, kv_heads, pages]``.
        tail: bool ``[batch, kv_heads, tail]``: exact tokens; heads differ by whole pages.
        each: How many exact tokens stay of every head, if it takes no look at the scores to know.
    """

    pages: torch.Tensor
    tail: torch.Tensor
    each: int | None


def choose(
    pages: torch.Tensor, tail: torch.Tensor, base: int, units: int, page_tokens: int, *, is_pooled: bool
) -> Chosen:
    """The ``base`` best exact tokens of every KV head, then the best units of a page.

    A unit is a page that is packed, or the ``page_tokens`` exact tokens that follow in the order of their scores; it is
    worth the sum of its tokens. Units are chosen for each head, or among all heads of a layer (``is_pooled``), which is
    the choice of the largest sum that whole pages allow. Of equals the first ones stay.

    Args:
        pages: Scores of pages, fp64 ``[batch, kv_heads, pages]``; NaN where a head has no such page.
        tail: Scores of exact tokens, fp64 ``[batch, kv_heads, tail]``.
        base: Exact tokens of every head.
        units: Units of a head; of a layer they are ``kv_heads`` times as many.
        page_tokens: Tokens in a page.
        is_pooled: Whether heads compete.
    """
    blocks, count = (tail.shape[-1] - base) // page_tokens, pages.shape[-1]
    if not is_pooled and not count:
        each = base + min(units, blocks) * page_tokens
        return Chosen(pages.bool(), best(tail, each), each)
    ranked = tail.sort(dim=-1, descending=True).values
    further = ranked[..., base : base + blocks * page_tokens].unflatten(-1, (blocks, page_tokens)).sum(-1)
    worth = torch.cat([pages, further], dim=-1)
    exists = ~worth.isnan()
    competing = torch.where(exists, worth, -torch.inf)
    of_all = competing.flatten(1) if is_pooled else competing
    stays = best(of_all, units * worth.shape[1] if is_pooled else units).view(worth.shape) & exists
    counts = base + page_tokens * stays[..., count:].sum(-1, keepdim=True)
    least = ranked.gather(-1, (counts - 1).clamp_min(0)) if ranked.shape[-1] else ranked
    return Chosen(stays[..., :count], _from(least, tail, counts), None)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the ``count`` largest of the last dimension are, of equals the first ones: bool, shaped like the scores."""
    count = min(count, scores.shape[-1])
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return _from(scores.topk(count, sorted=False).values.amin(-1, keepdim=True), scores, count)


def _from(least: torch.Tensor, scores: torch.Tensor, counts: int | torch.Tensor) -> torch.Tensor:
    """`best` of ``counts`` scores, the least of which is known."""
    above, equal = scores > least, scores == least
    return above | (equal & (equal.cumsum(-1) <= counts - above.sum(-1, keepdim=True)))

"""What a layer that evicts hands to attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvloom.pages import PagedKV


@dataclass(frozen=True)
class KeptKV(PagedKV):
    """`PagedKV` of the tokens that are kept: its slots number those, in order of position.

    Every kept token comes before this pass's own, so kernels read it as any `PagedKV`, given the mask of `mask_of`.

    Attributes:
        slots_of: Gives the places of the kept tokens in their sequences, int64 ``[batch, kv_heads, length]``; -1 for
            nothing. None if every token is kept: slots are places.
        is_even: Whether every head of every sequence keeps as many.
        observe: To be called with this pass's queries (as the model made them) and the caller's options once they have
            been attended to: tokens leave then.
    """

    slots_of: Callable[[], torch.Tensor] | None = field(kw_only=True)
    is_even: bool = field(kw_only=True)
    observe: Callable[..., None] = field(kw_only=True)

    def mask_of(self, mask: torch.Tensor | None, query_heads: int, queries: int) -> torch.Tensor | None:
        """A mask by place in the sequence as one by kept token.

        Args:
            mask: None for causal, or ``[batch or 1, heads or 1, queries, places]``, boolean or additive.
            query_heads: Query heads.
            queries: Queries of this pass.

        Returns:
            None for causal, or ``[batch, query_heads, queries, length]``; or ``mask`` if every token is kept.
        """
        if self.slots_of is None or (mask is None and self.is_even):
            return mask
        slots = self.slots_of()
        group = query_heads // slots.shape[1]
        if mask is None:
            own = slots[..., -queries:, None]
            return (slots[..., None, :].ge(0) & (slots[..., None, :] <= own)).repeat_interleave(group, dim=1)
        columns = slots.repeat_interleave(group, dim=1)[..., None, :].expand(-1, -1, queries, -1)
        chosen = mask.expand(len(slots), query_heads, -1, -1).gather(-1, columns.clamp_min(0))
        if mask.dtype == torch.bool:
            return chosen & (columns >= 0)
        return chosen.masked_fill(columns < 0, torch.finfo(chosen.dtype).min)


def real_places(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which places of a sequence the newest query may look at: bool ``[batch or 1, places]``; None for all.

    A place that it may not look at is padding.
    """
    if mask is None:
        return None
    last = mask[:, :, -1].amax(1)
    return last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2

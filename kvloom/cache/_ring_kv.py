"""What a sliding-window layer of fixed size hands to attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RingKV:
    """The newest tokens, each at the slot that is its number modulo the window.

    Attributes:
        key: ``[batch, kv_heads, window, head_dim]``.
        value: The same shape.
        level: int64 ``[1]``: tokens of every sequence, this pass's own included.
    """

    key: torch.Tensor
    value: torch.Tensor
    level: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.key.device

    def mask_of(self, mask: torch.Tensor | None) -> torch.Tensor:
        """The part of a mask by place that is about the slots; slots without a token are hidden.

        Args:
            mask: ``[batch or 1, heads or 1, 1, places]``, boolean or additive; None hides nothing.
        """
        newest = self.level - 1
        slots = torch.arange(self.key.shape[2], device=self.key.device)
        places = newest - (newest - slots) % len(slots)
        is_held = (places >= 0)[None, None, None]
        if mask is None:
            return is_held
        of_slots = mask.index_select(-1, places.clamp(min=0))
        if mask.dtype == torch.bool:
            return of_slots & is_held
        return of_slots.masked_fill(~is_held, torch.finfo(mask.dtype).min)

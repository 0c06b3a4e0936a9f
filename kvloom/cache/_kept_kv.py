"""What a layer that evicts hands to attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvloom.pages import PagedKV


@dataclass(frozen=True)
class KeptKV(PagedKV):
    """`PagedKV` of the tokens that are kept, in order of position; every one of them comes before this pass's own.

    Attributes:
        observe: To be called with this pass's queries (as the model made them) and the caller's options once they have
            been attended to: tokens leave then.
    """

    observe: Callable[..., None] = field(kw_only=True)

    def mask_of(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The part of a mask by place that is about tokens seen.

        A layer of fixed size asks for masks of every place there is room for, and layers share masks.
        """
        return mask if mask is None or self.places is not None else mask[..., : self.length]


def real_places(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which places of a sequence the newest query may look at: bool ``[batch or 1, places]``; None for all.

    A place that it may not look at is padding.
    """
    if mask is None:
        return None
    last = mask[:, :, -1].amax(1)
    return last if mask.dtype == torch.bool else last > torch.finfo(mask.dtype).min / 2

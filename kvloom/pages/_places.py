"""The places of kept tokens in their sequences, from 0 on, in as few bytes as they need."""

from __future__ import annotations

import torch


def stored(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Places as they are stored: 0 is the least number of the dtype."""
    return (places.long() + torch.iinfo(dtype).min).to(dtype)


def places(stored_places: torch.Tensor) -> torch.Tensor:
    """The inverse of `stored`, int64."""
    return stored_places.long() - torch.iinfo(stored_places.dtype).min

"""The places of kept tokens in their sequences, from 0 on, in as few bytes as they need."""

from __future__ import annotations

import torch


def stored(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Places as they are stored: 0 is the least number of the dtype."""
    return (places.long() + torch.iinfo(dtype).min).to(dtype)


def stored_run(start: int, stop: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`stored` places from ``start`` on, ``[stop - start]``; the dtype holds them."""
    least = torch.iinfo(dtype).min
    return torch.arange(start + least, stop + least, dtype=dtype, device=device)


def places(stored_places: torch.Tensor) -> torch.Tensor:
    """The inverse of `stored`, int64."""
    return stored_places.long() - torch.iinfo(stored_places.dtype).min

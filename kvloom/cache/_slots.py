"""The places of kept tokens in their sequences, in as few bytes as the length of the sequence allows."""

from __future__ import annotations

import torch

from kvloom.eviction import slot_nbytes

_DTYPES = {2: torch.int16, 4: torch.int32}


def slot_dtype(tokens: int) -> torch.dtype:
    """What places are stored in once ``tokens`` have been seen."""
    return _DTYPES[slot_nbytes(tokens)]


def stored(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Places from 0 on, as they are stored: 0 is the least number of the dtype."""
    return (places.long() + torch.iinfo(dtype).min).to(dtype)


def places(slots: torch.Tensor) -> torch.Tensor:
    """The inverse of `stored`, int64."""
    return slots.long() - torch.iinfo(slots.dtype).min

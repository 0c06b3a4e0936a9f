"""In how many bytes the places of kept tokens are stored."""

from __future__ import annotations

import torch

from kvloom.eviction import slot_nbytes

_DTYPES = {2: torch.int16, 4: torch.int32}


def slot_dtype(tokens: int) -> torch.dtype:
    """What places are stored in once ``tokens`` have been seen."""
    return _DTYPES[slot_nbytes(tokens)]

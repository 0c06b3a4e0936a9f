"""What has no code: elements that scales in fp16 cannot express."""

from __future__ import annotations

import torch

from kvloom.codecs._half import FP16_MAX
from kvloom.errors import CacheError

OUT_OF_RANGE = (
    "keys or values to be packed hold NaN, infinity or a magnitude above 65504, which fp16 scales cannot express: find "
    "the layer that overflows, or keep it exact with bits=16."
)


def check_range(low: torch.Tensor, high: torch.Tensor) -> None:
    """Raise CacheError unless the smallest and largest elements of groups are finite and within fp16's range."""
    bound = torch.maximum(low.abs(), high.abs()).amax() if low.numel() else low.new_zeros(())
    if not bool(bound <= FP16_MAX):
        raise CacheError(OUT_OF_RANGE)

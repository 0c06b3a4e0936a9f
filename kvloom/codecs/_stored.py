"""What a cache makes of keys or values: encode and decode, rotation included."""

from __future__ import annotations

import torch

from kvloom.codecs._base import get
from kvloom.codecs._rotation import dual, rotated, signs
from kvloom.pages import Format


def as_stored(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """``x`` ``[..., tokens, head_dim]``, whole groups of tokens, as a cache of this format gives it back, in fp32."""
    if fmt.is_passthrough:
        return x.float()
    codec = get(fmt.codec)
    if fmt.rotation is None:
        return codec.decode(codec.encode(x, fmt), fmt)
    turn = fmt.rotation, x.shape[-1]
    stored = codec.decode(codec.encode(rotated(x, signs(*turn, x.device)), fmt), fmt)
    return stored @ dual(*turn, device=x.device).T

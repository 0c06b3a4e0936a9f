"""What a cache makes of keys or values: encode and decode, rotation and outliers included."""

from __future__ import annotations

import torch

from kvloom.codecs._base import get
from kvloom.codecs._outliers import joined, split
from kvloom.codecs._rotation import dual, rotated, signs
from kvloom.pages import Format, num_outliers


def as_stored(x: torch.Tensor, fmt: Format, page_tokens: int) -> torch.Tensor:
    """What pages give back.

    Args:
        x: ``[..., tokens, head_dim]``, whole pages.
        fmt: Format.
        page_tokens: Tokens in a page.

    Returns:
        fp32, the shape of ``x``.
    """
    if fmt.is_passthrough:
        return x.float()
    turn = None if fmt.rotation is None else (fmt.rotation, x.shape[-1])
    pages = x.unflatten(-2, (-1, page_tokens))
    stored = _decoded(rotated(pages, signs(*turn, x.device)) if turn else pages, fmt).flatten(-3, -2)
    return stored @ dual(*turn, device=x.device).T if turn else stored


def _decoded(pages: torch.Tensor, fmt: Format) -> torch.Tensor:
    """fp32 ``[..., page_tokens, head_dim]``."""
    codec, count = get(fmt.codec), num_outliers(fmt, pages.shape[-1], pages.shape[-2])
    if not count:
        return codec.decode(codec.encode(pages, fmt), fmt)
    dense, outliers = split(pages, fmt, count)
    return joined(codec.decode(codec.encode(dense, fmt), fmt), outliers)

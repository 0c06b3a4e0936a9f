"""Outliers to page bytes and back, in torch: ``index[count]`` in uint16, then ``value[count]`` in fp16."""

from __future__ import annotations

import torch

from kvloom.pages._layout import OUTLIER_BYTES, SideLayout


def pack_outliers(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The bytes that follow those of `pack_side`.

    Args:
        index: int64 ``[..., count]``, ``token * head_dim + channel`` within the page, below 65536.
        values: fp16 ``[..., count]``.

    Returns:
        uint8 ``[..., 4 * count]``.
    """
    parts = (index.to(torch.int16), values)  # two's complement: the low 16 bits, as uint16 has them
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_outliers(pages: torch.Tensor, side: SideLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Index int64 and values fp16 ``[..., num_outliers]`` of a side of records ``[..., record bytes]``."""
    start = side.outliers_offset
    raw = pages[..., start : start + side.num_outliers * OUTLIER_BYTES].view(torch.int16)
    index, values = raw.chunk(2, dim=-1)
    return index.long() & 0xFFFF, values.view(torch.float16)

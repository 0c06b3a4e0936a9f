"""Rotary positions on a CUDA device: launcher of ``rope.cu``."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvloom.kernels._nvrtc import ELEMENTS, HALVES, Defines, int64, is_aligned, module

_THREADS = 128
_LANE = 16  # channels of a lane


def rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Backend.rope`.

    Args:
        query: fp16 or bf16, see `turns`.
        key: Likewise.
        cos: Likewise.
        sin: Likewise.

    Returns:
        Both, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    turned = [x.new_empty(x.shape) for x in (query, key)]
    (batch, query_heads, _, dim), kv_heads = query.shape, key.shape[1]
    lanes = batch * (query_heads + kv_heads) * dim // _LANE
    by_head = [int64(x.stride(i)) for x in (query, key) for i in (0, 1)]
    by_sequence = [int64(0 if len(x) == 1 else x.stride(0)) for x in (cos, sin)]
    with torch.cuda.device(query.device):
        module("rope.cu", _build(query.dtype, dim)).launch(
            "rope",
            (-(-lanes // _THREADS), 1, 1),
            (_THREADS, 1, 1),
            *(query, *by_head[:2], key, *by_head[2:], cos, by_sequence[0], sin, by_sequence[1]),
            *(*turned, batch, query_heads, kv_heads),
            follows=True,
        )
    return turned[0], turned[1]


def turns(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rope` takes these."""
    dim = query.shape[-1]
    return (
        query.dtype in HALVES
        and query.shape[2] == 1
        and dim % _LANE == 0 < dim
        and all(it.dtype == query.dtype and is_aligned(it) for it in (query, key, cos, sin))
    )


@lru_cache(maxsize=32)
def _build(dtype: torch.dtype, dim: int) -> Defines:
    """Defines of ``rope.cu``."""
    return ("ELEMENT", ELEMENTS[dtype]), ("D", dim), ("THREADS", _THREADS)

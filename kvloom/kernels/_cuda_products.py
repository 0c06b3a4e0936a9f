"""Products of few rows with weights on a CUDA device: launcher of ``products.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from kvloom.kernels._base import PRODUCT_ROWS, PRODUCT_WEIGHTS
from kvloom.kernels._nvrtc import Defines, int64, module

_FEATURES = 16  # of a block
_STEP = 64  # channels that a warp takes together
_WARPS = 8
_ALIGNMENT = 16
_KINDS = {torch.float16: ("__half", "f16"), torch.bfloat16: ("__nv_bfloat16", "bf16")}


def products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``x @ weight.T`` of each weight, summed in fp32, in one launch.

    Args:
        x: fp16 or bf16 ``[rows, channels]``, see `multiplies`.
        weights: ``[features, channels]`` each.

    Returns:
        ``[rows, features]`` of each, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    rows, channels = x.shape
    outs = [x.new_empty((rows, weight.shape[0])) for weight in weights]
    blocks = sum(weight.shape[0] for weight in weights) // _FEATURES
    parts: list[Any] = []
    for weight, out in zip(weights, outs, strict=True):
        parts += weight, int64(weight.stride(0)), out, weight.shape[0]
    parts += [None, int64(0), None, 0] * (PRODUCT_WEIGHTS - len(weights))
    with torch.cuda.device(x.device):
        module("products.cu", _build(x.dtype)).launch(
            "products", (blocks, 1, 1), (32 * _WARPS, 1, 1), x, int64(x.stride(0)), rows, channels, *parts
        )
    return outs


def multiplies(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether `products` takes these."""
    return (
        x.dtype in _KINDS
        and 1 <= x.shape[0] <= PRODUCT_ROWS
        and x.shape[1] % _STEP == 0
        and 1 <= len(weights) <= PRODUCT_WEIGHTS
        and all(weight.dtype == x.dtype and weight.shape[0] % _FEATURES == 0 < weight.shape[0] for weight in weights)
        and all(map(_is_aligned, (x, *weights)))
    )


def _is_aligned(matrix: torch.Tensor) -> bool:
    row, channel = matrix.stride()
    return channel == 1 and row * matrix.itemsize % _ALIGNMENT == 0 and matrix.data_ptr() % _ALIGNMENT == 0


@lru_cache(maxsize=8)
def _build(dtype: torch.dtype) -> Defines:
    """Defines of ``products.cu``."""
    element, kind = _KINDS[dtype]
    return ("ELEMENT", element), ("KIND", kind), ("WARPS", _WARPS)

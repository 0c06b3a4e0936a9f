"""Products of few rows with weights on a CUDA device: launcher of ``products.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from kvloom.kernels._base import PRODUCT_ROWS, PRODUCT_WEIGHTS
from kvloom.kernels._nvrtc import ALIGNMENT, ELEMENTS, Defines, int64, module

_FEATURES = 16  # of a block
_STEP = 64  # channels that a warp takes together
_MAX_WARPS = 8
_KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def products(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """``x @ weight.T + bias`` of each weight, summed in fp32, in one launch.

    Args:
        x: fp16 or bf16 ``[rows, channels]``, see `multiplies`.
        weights: ``[features, channels]`` each.
        biases: ``[features]`` of each, or None.

    Returns:
        ``[rows, features]`` of each, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    outs = [x.new_empty((len(x), weight.shape[0])) for weight in weights]
    _launch(x, list(zip(weights, biases, outs, strict=True)), sum(weight.shape[0] for weight in weights) // _FEATURES)
    return outs


def gated_product(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``, summed in fp32, rounded after every step, in one launch.

    Args:
        x: fp16 or bf16 ``[rows, channels]``, see `multiplies`.
        gate: ``[features, channels]``.
        up: Of the same shape.

    Returns:
        ``[rows, features]``, contiguous.

    Raises:
        KernelError: The kernel cannot be built.
    """
    out = x.new_empty((len(x), gate.shape[0]))
    _launch(x, [(gate, None, out), (up, None, out)], 2 * gate.shape[0] // _FEATURES, gated=True)
    return out


_To = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""A weight, its bias, and where the product goes."""


def _launch(x: torch.Tensor, to: Sequence[_To], blocks: int, *, gated: bool = False) -> None:
    parts: list[Any] = []
    for weight, bias, out in to:
        parts += weight, int64(weight.stride(0)), bias, out, weight.shape[0]
    parts += [None, int64(0), None, None, 0] * (PRODUCT_WEIGHTS - len(to))
    rows, channels = x.shape
    warps = min(_MAX_WARPS, channels // _STEP)
    with torch.cuda.device(x.device):
        module("products.cu", _build(x.dtype, gated, warps)).launch(
            "products",
            (blocks, 1, 1),
            (32 * warps, 1, 1),
            *(x, int64(x.stride(0)), rows, channels, *parts),
            follows=True,
        )


def multiplies(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] = ()) -> bool:
    """Whether `products` takes these."""
    return (
        x.dtype in _KINDS
        and 1 <= x.shape[0] <= PRODUCT_ROWS
        and x.shape[1] % _STEP == 0
        and 1 <= len(weights) <= PRODUCT_WEIGHTS
        and all(weight.dtype == x.dtype and weight.shape[0] % _FEATURES == 0 < weight.shape[0] for weight in weights)
        and all(map(_is_aligned, (x, *weights)))
        and all(bias is None or (bias.dtype == x.dtype and bias.is_contiguous()) for bias in biases)
    )


def _is_aligned(matrix: torch.Tensor) -> bool:
    row, channel = matrix.stride()
    return channel == 1 and row * matrix.itemsize % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


@lru_cache(maxsize=32)
def _build(dtype: torch.dtype, gated: bool, warps: int) -> Defines:
    """Defines of ``products.cu``."""
    return ("ELEMENT", ELEMENTS[dtype]), ("KIND", _KINDS[dtype]), ("WARPS", warps), ("GATED", int(gated))

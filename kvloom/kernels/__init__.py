"""The hot operations (encode, attend, decode) behind one contract; today the torch reference."""

from __future__ import annotations

import torch

from kvloom.kernels._base import Backend
from kvloom.kernels._torch import TORCH, dense_attention

__all__ = ["Backend", "backend", "dense_attention"]


def backend(device: torch.device) -> Backend:
    """The fastest backend for ``device``: torch, which runs everywhere, until the GPU kernels land."""
    del device
    return TORCH

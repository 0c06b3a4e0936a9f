"""The hot operations (encode, attend, decode) behind one contract."""

from __future__ import annotations

import logging
from functools import cache

import torch

from kvloom.errors import KernelError
from kvloom.kernels._base import Backend
from kvloom.kernels._cpu import CpuBackend
from kvloom.kernels._torch import TORCH, dense_attention

__all__ = ["Backend", "backend", "dense_attention"]


def backend(device: torch.device) -> Backend:
    """The fastest backend for ``device``; what keeps a faster one from being used is logged once, as a warning."""
    return _on_cpu() if device.type == "cpu" else TORCH


@cache
def _on_cpu() -> Backend:
    try:
        return CpuBackend()
    except KernelError as error:
        logging.getLogger("kvloom").warning("kvloom reads packed pages in plain torch, slower: %s.", error)
        return TORCH

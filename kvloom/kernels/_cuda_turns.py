"""What kernels need that turn queries, keys and outputs themselves: ``rope.cuh`` and ``hadamard.cuh``."""

from __future__ import annotations

from typing import Any

import torch

from kvloom.codecs import hadamard_power, signs
from kvloom.kernels._nvrtc import HALVES, Defines, int64, is_aligned
from kvloom.kernels._turns import Rope

_LANE = 8  # channels, whose partners lie half a head away


def ropes(x: torch.Tensor, rope: Rope) -> bool:
    """Whether kernels turn these heads ``[batch, heads, 1, head_dim]`` by their positions."""
    is_one = x.shape[2] == 1 and x.shape[3] % (2 * _LANE) == 0
    return is_one and x.dtype in HALVES and all(it.dtype == x.dtype and is_aligned(it) for it in rope)


def rope_arguments(rope: Rope | None) -> tuple[Any, ...]:
    """Cosines and sines as a kernel with ``ROPED`` takes them; nothing without."""
    return () if rope is None else tuple(it for x in rope for it in (x, int64(0 if len(x) == 1 else x.stride(0))))


def hadamard_defines(head_dim: int) -> Defines:
    """Those of ``hadamard.cuh``, but for the number of channels."""
    bits = (signs("hadamard", head_dim) < 0).tolist()
    words = (sum(bit << i for i, bit in enumerate(bits[at : at + 32])) for at in range(0, head_dim, 32))
    return ("HADAMARD_POWER", hadamard_power(head_dim)), ("HADAMARD_SIGNS", ", ".join(f"{word}u" for word in words))

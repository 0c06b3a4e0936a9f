"""Rotations of head channels: outliers of a few channels are spread over all before they are quantised.

Keys and values are cached as ``x F``. Scores need queries ``q G`` with ``F G^T = I``, and what attention returns is
brought back by ``G^T``: nothing that is cached is turned back at a step. ``hadamard`` is a randomised Hadamard
transform (QuIP#, arXiv 2402.04396; for KV caches QuaRot, arXiv 2404.00456): random signs, then Sylvester's matrix in
blocks of the largest power of two that divides head_dim. The factor ``1 / block`` is shared out between F and G as
powers of two, so that both matrices are exact in every dtype. (``calibrated``: see ``_calibrated.py``.)
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kvloom.errors import PlanError
from kvloom.pages import Rotation

_SEED = 0


@lru_cache(maxsize=64)
def signs(rotation: Rotation, head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """What `rotated` multiplies channels with first: fair signs, the same on every machine, and F's power of two.

    Raises:
        PlanError: The rotation is calibrated: it is a plan's, not a format's.
    """
    if rotation != "hadamard":
        raise PlanError(f"rotation {rotation!r} takes its matrices from a plan; a format alone cannot be turned by it.")
    generator = torch.Generator("cpu").manual_seed(_SEED)
    bits = torch.randint(2, (head_dim,), generator=generator, device="cpu")  # whatever torch's defaults are
    return ((2.0 * bits.float() - 1.0) * 2.0 ** -(hadamard_power(head_dim) // 2)).to(device)


def rotated(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """``x F`` for ``x`` ``[..., head_dim]``, in its dtype.

    Sums are in fp32 (fp64 for fp64) and in one order whatever the shape, so that codes do not depend on how tokens
    arrived.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32)) * signs
    for power in range(hadamard_power(x.shape[-1])):
        pairs = y.unflatten(-1, (-1, 2, 2**power))
        first, second = pairs.unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
    return y.to(x.dtype)


@lru_cache(maxsize=64)
def dual(
    rotation: Rotation, head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> torch.Tensor:
    """``G`` ``[head_dim, head_dim]``: for queries; transposed, for what attention returns and for decoded states."""
    forward = rotated(torch.eye(head_dim), signs(rotation, head_dim))
    return (forward * 2.0 ** -(hadamard_power(head_dim) % 2)).to(device, dtype)


def hadamard_power(head_dim: int) -> int:
    """Logarithm of the transform's block, the largest power of two that divides ``head_dim``."""
    return (head_dim & -head_dim).bit_length() - 1

"""Turning queries, keys and outputs of a decode step, by positions and rotations, where no kernel does it."""

from __future__ import annotations

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of rotary positions, ``[batch or 1, 1, head_dim]``, the same for all heads."""


def roped(x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """``x * cos + [-x_2, x_1] * sin`` of the halves of a head's channels (rotary positions, arXiv:2104.09864)."""
    if rope is None:
        return x
    cos, sin = (angles.unsqueeze(1) for angles in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def turned(x: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    """Heads ``[batch, heads, tokens, head_dim]`` times the matrix of all, or of the KV head they belong to."""
    if matrix is None:
        return x
    wide = x.to(matrix.dtype)
    if matrix.dim() == 2:
        return (wide @ matrix).to(x.dtype)
    grouped: torch.Tensor = wide.unflatten(1, (len(matrix), -1)) @ matrix[:, None]
    return grouped.flatten(1, 2).to(x.dtype)


def turned_back(out: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    """`turned`, of what attention returns, ``[batch, tokens, heads, head_dim]``."""
    return turned(out.transpose(1, 2), matrix).transpose(1, 2)

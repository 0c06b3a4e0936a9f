"""How one side of a layer's cache is turned, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvloom.codecs import dual, rotated, signs
from kvloom.pages import PageLayout, Role, Rotation


@dataclass(frozen=True)
class SideRotation:
    """A rotation of all KV heads, or of some.

    Attributes:
        signs: Of the rotation, ``[head_dim]``.
        heads: KV heads that are turned; None for all.
        dual: ``G`` of `kvloom.codecs.dual`, ``[head_dim, head_dim]``, or ``[kv_heads, head_dim, head_dim]`` for some.
    """

    signs: torch.Tensor
    heads: tuple[int, ...] | None
    dual: torch.Tensor

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """States ``[batch, kv_heads, tokens, head_dim]`` as they are cached."""
        if self.heads is None:
            return rotated(x, self.signs)
        return torch.stack(
            [rotated(head, self.signs) if n in self.heads else head for n, head in enumerate(x.unbind(1))], dim=1
        )

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `cached`, up to rounding."""
        return turned(x, self.dual.transpose(-1, -2))


def side_rotation(
    layouts: Sequence[PageLayout], side: Role, dtype: torch.dtype, device: torch.device
) -> SideRotation | None:
    """The rotation that the layouts of a layer's KV heads ask for; None if no head is turned."""
    names = [getattr(layout, side).fmt.rotation for layout in layouts]
    heads = tuple(head for head, name in enumerate(names) if name)
    if not heads:
        return None
    turn: tuple[Rotation, int] = names[heads[0]], layouts[0].head_dim
    factors, matrix = signs(*turn, device), dual(*turn, dtype, device)
    if len(heads) == len(names):
        return SideRotation(factors, None, matrix)
    each = torch.eye(len(matrix), dtype=dtype, device=device).repeat(len(names), 1, 1)
    each[list(heads)] = matrix
    return SideRotation(factors, heads, each)


def turned(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Heads ``[batch, heads, tokens, head_dim]`` times the matrix of all, or of the KV head they belong to."""
    if matrix.dim() == 2:
        return x @ matrix
    grouped: torch.Tensor = x.unflatten(1, (len(matrix), -1)) @ matrix[:, None]
    return grouped.flatten(1, 2)

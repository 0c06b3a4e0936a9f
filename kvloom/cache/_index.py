"""What is taken out of tensors by number, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


def numbers(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Numbers that the host knows, on a device: ``[len(values)]``."""
    # Pageable memory is read before the call returns, so the tensor on the host may go.
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def named(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where a mask is true, by number over all its dimensions: int64 ``[count]``, rising.

    Args:
        mask: bool, any shape.
        count: In how many places it is true.
    """
    return torch.searchsorted(mask.flatten().cumsum(0), torch.arange(1, count + 1, device=mask.device))


def taken(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Entries of ``x [batch, kv_heads, tokens, ...]``, by number over these three dimensions: ``[*at.shape, ...]``."""
    return x.flatten(0, 2)[at]


def of_heads(x: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Some heads of ``x [batch, heads, ...]``, in this order."""
    return x if heads == tuple(range(x.shape[1])) else x.index_select(1, _head_numbers(heads, x.device))


def joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Tensors as one along a dimension: no copy if one alone has anything."""
    full = [part for part in parts if part.shape[dim]] or [parts[0]]
    return full[0] if len(full) == 1 else torch.cat(full, dim=dim)


def by_head(parts: Sequence[torch.Tensor], heads: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Tensors ``[batch, len(heads of it), ...]`` as one, in the order of their heads."""
    order = [head for of_part in heads for head in of_part]
    return of_heads(joined(parts, dim=1), tuple(sorted(range(len(order)), key=order.__getitem__)))


@lru_cache(maxsize=256)
def _head_numbers(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return numbers(heads, device)

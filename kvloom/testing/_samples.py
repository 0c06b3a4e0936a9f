"""Tensors that look like keys and values, and the worst of them."""

from __future__ import annotations

import torch

from kvloom.pages import Format, page_tokens_of
from kvloom.testing._formats import HEAD_DIM


def pages(fmt: Format, seed: int = 0) -> torch.Tensor:
    """fp32 ``[batch 2, heads 3, pages 2, page_tokens, HEAD_DIM]``; channels differ in size, offset and outliers."""
    x = states(2 * page_tokens_of(fmt), batch=2, heads=3, seed=seed)
    return x.view(2, 3, 2, page_tokens_of(fmt), HEAD_DIM)


def states(tokens: int, *, batch: int = 1, heads: int = 2, seed: int = 0) -> torch.Tensor:
    """fp32 ``[batch, heads, tokens, HEAD_DIM]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, heads, tokens, HEAD_DIM), generator=generator)
    is_outlier = torch.rand(x.shape, generator=generator) < 0.002
    spread = torch.logspace(-2, 1, HEAD_DIM)
    return torch.where(is_outlier, 20 * x, x) * spread + 3 * spread.flip(0)

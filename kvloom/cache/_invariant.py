"""Linear layers whose result for a token does not depend on what else is in the pass.

A matrix product takes another order of sums for another number of rows, so a token's hidden state differs by a rounding
with the length of its pass and the size of its batch. Products of one fixed shape do not (He et al., "Defeating
Nondeterminism in LLM Inference", Thinking Machines Lab 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

ROWS = 16


def fix_rows(model: Any) -> None:
    """Let every linear layer take its rows in blocks of ``ROWS``, the last one filled up with zeros."""
    for layer in _linear(model):
        if "forward" not in vars(layer):
            layer.forward = partial(_by_rows, layer.forward)


def free_rows(model: Any) -> None:
    """Undo `fix_rows`."""
    for layer in _linear(model):
        if getattr(vars(layer).get("forward"), "func", None) is _by_rows:
            del layer.forward


def _linear(model: Any) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D))


def _by_rows(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``forward`` of ``x`` ``[..., features]``, ``ROWS`` rows at a time."""
    rows = x.reshape(-1, x.shape[-1])
    blocks = pad(rows, (0, 0, 0, -len(rows) % ROWS)).split(ROWS)
    out = torch.cat([forward(block) for block in blocks])[: len(rows)]
    return out.view(*x.shape[:-1], out.shape[-1])

"""What storing one layer's keys or values would do to the log likelihood, from one kept attention.

With `G` the gradient of the sum of log p(next token) by the attention's output `O = P V`:

- values: `O` is linear in them, so the gradient by the values read from pages is `P_packed^T G`;
- keys: their errors sit inside a softmax, where a first-order expansion misses that large errors on
  tokens of little weight lift that weight. So the softmax is computed with the stored keys, and only
  what follows is linear: query `i` changes the log likelihood by `sum_j (P_hat - P)_ij (G_i . V_j)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvloom.signals._tap import Run, Tapped, grouped_matmul, seen_by


def value_gradient(tapped: Tapped) -> Tensor:
    """Gradient by the packed copies of the values: float32 `[batch, kv_heads, tokens, head_dim]`."""
    total = torch.zeros_like(tapped.value, dtype=torch.float32)
    for run, _, weights, gradient in _packed_runs(tapped):
        packed = weights[..., run.first : run.last].flatten(2, 3)  # [batch, kv_heads, group*run, n]
        total[:, :, run.first : run.last] += packed.transpose(-1, -2) @ gradient.flatten(2, 3)
    return total


def key_changes(tapped: Tapped, stored: Sequence[Tensor]) -> Tensor:
    """Change of the log likelihood through each query when keys are read as stored.

    Args:
        tapped: The kept attention.
        stored: Alternatives, each `[batch, kv_heads, tokens, head_dim]`; only packed tokens matter.

    Returns:
        float32 `[alternatives, batch, tokens]`, summed over heads.
    """
    batch, tokens = tapped.key.shape[0], tapped.key.shape[2]
    changes = tapped.key.new_zeros((len(stored), batch, tokens), dtype=torch.float32)
    key, value = tapped.key.float(), tapped.value.float()
    for run, query, weights, gradient in _packed_runs(tapped):
        slope = grouped_matmul(gradient, value[:, :, : run.stop].transpose(-1, -2))
        for alternative, other in zip(changes, stored, strict=True):
            seen = seen_by(run, key, other)
            moved = tapped.scoring.probabilities(query, seen, run.start) - weights
            alternative[:, run.start : run.stop] = (moved * slope).sum(dim=(1, 2, 4))
    return changes


def _packed_runs(tapped: Tapped) -> Iterator[tuple[Run, Tensor, Tensor, Tensor]]:
    """Runs that see packed tokens, with their queries, exact weights and output gradients in float32."""
    if tapped.gradient is None:
        raise RuntimeError("the tapped attention has seen no backward pass")
    for run in tapped.runs:
        if run.last > run.first:
            rows = slice(run.start, run.stop)
            query = tapped.query[:, :, :, rows].float()
            key = tapped.key[:, :, : run.stop].float()
            weights = tapped.scoring.probabilities(query, key, run.start)
            yield run, query, weights, tapped.gradient[:, :, :, rows].float()

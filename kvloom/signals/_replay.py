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

from kvloom.signals._base import Side
from kvloom.signals._tap import Run, Tapped, grouped_matmul, seen_by

_ALTERNATIVES = {"cpu": 1}
"""Alternatives whose scores exist at a time: few enough that they stay in a CPU's caches."""

_MANY_ALTERNATIVES = 16
"""Elsewhere: enough to fill a GPU."""


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
        float32 `[alternatives, batch, kv_heads, tokens]`, summed over the query heads of a KV head.
    """
    groups = in_groups(stored)
    batch, heads, tokens = tapped.key.shape[:3]
    changes = torch.zeros((len(stored), batch, heads, tokens), device=tapped.key.device)
    key, value = tapped.key.float(), tapped.value.float()
    for run, query, weights, gradient in _packed_runs(tapped):
        slope = grouped_matmul(gradient, value[:, :, : run.stop].transpose(-1, -2))
        moved = (stored_weights(tapped, run, query, key, group) - weights for group in groups)
        parts = [(change * slope).sum(dim=(3, 5)) for change in moved]
        changes[..., run.start : run.stop] = torch.cat(parts)
    return changes


def in_groups(stored: Sequence[Tensor]) -> list[Tensor]:
    """Alternatives in groups that are worked on at a time, one after the other in the first dimension."""
    several = _ALTERNATIVES.get(stored[0].device.type, _MANY_ALTERNATIVES)
    return [torch.cat(list(stored[n : n + several])) for n in range(0, len(stored), several)]


def stored_weights(tapped: Tapped, run: Run, query: Tensor, key: Tensor, stored: Tensor) -> Tensor:
    """Weights of a run's queries under each alternative, `[alternatives, batch, kv_heads, group, queries, keys]`.

    Args:
        tapped: The kept attention.
        run: The run.
        query: Its queries.
        key: Exact keys, `[batch, kv_heads, tokens, head_dim]`.
        stored: A group of alternatives; see `in_groups`.
    """
    batch = key.shape[0]
    times = stored.shape[0] // batch
    seen = seen_by(run, key.repeat(times, 1, 1, 1), stored)
    weights = tapped.scoring.repeated(times).probabilities(query.repeat(times, 1, 1, 1, 1), seen, run.start)
    apart: Tensor = weights.unflatten(0, (times, batch))
    return apart


def output_changes(tapped: Tapped, side: Side, stored: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention outputs of the queries that see packed tokens, and their changes when one side is read as stored.

    Args:
        tapped: The kept attention.
        side: Which side is stored.
        stored: Alternatives, each `[batch, kv_heads, tokens, head_dim]`; only packed tokens matter.

    Yields:
        For each run of queries the outputs, float32 `[batch, kv_heads, group, queries, head_dim]`, and their changes,
        `[alternatives, ...]`.
    """
    groups, key, value = in_groups(stored), tapped.key.float(), tapped.value.float()
    for run, query, weights in seen_runs(tapped):
        seen = value[:, :, : run.stop]
        if side == "key":
            moved = (stored_weights(tapped, run, query, key, group) - weights for group in groups)
            changes = torch.cat([torch.einsum("abhgqk,bhkd->abhgqd", change, seen) for change in moved])
        else:
            errors = torch.stack([seen_by(run, value, other) - seen for other in stored])
            changes = torch.einsum("bhgqk,abhkd->abhgqd", weights, errors)
        yield grouped_matmul(weights, seen), changes


def seen_runs(tapped: Tapped) -> Iterator[tuple[Run, Tensor, Tensor]]:
    """Runs that see packed tokens, with their queries and exact weights in float32."""
    for run in tapped.runs:
        if run.last > run.first:
            query = tapped.query[:, :, :, run.start : run.stop].float()
            key = tapped.key[:, :, : run.stop].float()
            yield run, query, tapped.scoring.probabilities(query, key, run.start)


def _packed_runs(tapped: Tapped) -> Iterator[tuple[Run, Tensor, Tensor, Tensor]]:
    """Likewise, with the gradients by their outputs."""
    if tapped.gradient is None:
        raise RuntimeError("the tapped attention has seen no backward pass")
    for run, query, weights in seen_runs(tapped):
        yield run, query, weights, tapped.gradient[:, :, :, run.start : run.stop].float()

"""What a layer shows a policy: its tokens, the newest queries, and what attention the tokens received."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from kvloom.eviction._base import Pooling

# Queries are taken this many scores at a time, so that a long prompt needs no [tokens, tokens] matrix: what a CPU has
# caches for; on a GPU the 32 last queries of a prompt of 32K tokens in one piece.
SCORE_BLOCK, GPU_SCORE_BLOCK = 1 << 22, 1 << 25


@dataclass(frozen=True)
class Reading:
    """How a layer's attention turns products into weights.

    Attributes:
        scaling: Factor of the scores.
        softcap: Scores become ``softcap * tanh(scores / softcap)``.
        sink_logits: ``[query_heads]`` extra logits that take part in the softmax only (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """A layer's tokens when some of them have to leave: its sinks, its pages and the exact ones, in this order.

    Attributes:
        slots: int64 ``[batch, kv_heads, tokens]``, the place of each token in its sequence, padding counted; -1 for
            nothing, where a head keeps fewer tokens than others.
        is_real: bool ``[batch, kv_heads, tokens]``: neither padding nor nothing.
        length: Tokens seen by the cache.
        queries: The newest queries of the prompt, ``[batch, query_heads, queries, head_dim]``: as many as the policy
            looks at, if there are as many. The last one belongs to the last token.
        reading: How attention weighs.
        read: Gives keys and values ``[batch, kv_heads, tokens, head_dim]`` as the model made them, packed ones decoded.
        mass: fp64 ``[batch, kv_heads, tokens]``: attention received from all queries so far (`received`), if the policy
            asks for it; tokens of a page have equal parts of what it received.
        all_real: Whether ``is_real`` is known to be true everywhere, so that nobody needs to look at it.
    """

    slots: torch.Tensor
    is_real: torch.Tensor
    length: int
    queries: torch.Tensor
    reading: Reading
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    mass: torch.Tensor | None = None
    all_real: bool = False

    @cached_property
    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read()

    @property
    def keys(self) -> torch.Tensor:
        """``[batch, kv_heads, tokens, head_dim]``."""
        return self._states[0]

    @property
    def values(self) -> torch.Tensor:
        """The same shape."""
        return self._states[1]

    def received(self, last: int | None = None) -> torch.Tensor:
        """Attention that the tokens receive from `queries`, or from so many of the last ones; see `received`."""
        queries = self.queries if last is None else self.queries[:, :, -last:]
        return received(queries, self.keys, self.slots, None if self.all_real else self.is_real, self.reading)

    def pooled(self, scores: torch.Tensor, kernel: int, pooling: Pooling) -> torch.Tensor:
        """Each score as the largest, or the mean, of the ``kernel`` scores around it; ``kernel`` is odd.

        Neighbours are the tokens held; beyond the first and the last one the mean counts zeros.
        """
        pool = torch.nn.functional.max_pool1d if pooling == "max" else torch.nn.functional.avg_pool1d
        out: torch.Tensor = pool(scores, kernel, stride=1, padding=kernel // 2)
        return out

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, query_heads, ...]`` by KV head: ``[batch, kv_heads, query heads of it, ...]``."""
        grouped: torch.Tensor = x.unflatten(1, (self.slots.shape[1], -1))
        return grouped


def received(
    queries: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, is_real: torch.Tensor | None, reading: Reading
) -> torch.Tensor:
    """Attention that each token receives: the sum over the queries, the mean over the query heads of a KV head.

    A query attends to the real tokens that do not come after it. Queries are taken in blocks: memory is linear in the
    number of tokens.

    Args:
        queries: ``[batch, query_heads, queries, head_dim]``, those of the last tokens.
        keys: ``[batch, kv_heads, tokens, head_dim]``.
        slots: int64 ``[batch, kv_heads, tokens]``; of the queries' own tokens, after all others and rising.
        is_real: bool of that shape; others neither receive nor give. None if all are.
        reading: How attention weighs.

    Returns:
        fp64 ``[batch, kv_heads, tokens]``: the sums do not show in what pieces queries came.
    """
    batch, heads, tokens = slots.shape
    total = torch.zeros((batch, heads, tokens), dtype=torch.float64, device=keys.device)
    group, first = queries.shape[1] // heads, tokens - queries.shape[2]
    scaled, wide = queries.float() * reading.scaling, keys.float()
    block = SCORE_BLOCK if keys.device.type == "cpu" else GPU_SCORE_BLOCK
    step = max(1, block // (batch * queries.shape[1] * tokens))
    for start in range(first, tokens, step):
        stop = min(start + step, tokens)  # what follows these queries' own tokens is hidden from them
        rows = scaled[:, :, start - first : stop - first].unflatten(1, (heads, group))
        own, real = slots[..., start:stop], None if is_real is None else is_real[..., :stop]
        weights = _weights(rows, wide[:, :, :stop], own, real, reading)
        if real is not None:
            weights.mul_(real[:, :, None, start:, None])
        total[..., :stop].add_(weights.sum((2, 3)))
    return total.div_(group)


def _weights(
    queries: torch.Tensor, keys: torch.Tensor, own: torch.Tensor, real: torch.Tensor | None, reading: Reading
) -> torch.Tensor:
    """Softmax of scaled queries by KV head, ``[batch, kv_heads, query heads of it, queries, tokens]``.

    The last tokens are the queries' own, at the slots ``own``.
    """
    rows, columns = queries.flatten(2, 3).flatten(0, 1), keys.flatten(0, 1).transpose(-1, -2)
    scores = torch.bmm(rows, columns).view(*queries.shape[:4], -1)
    if reading.softcap is not None:
        scores = reading.softcap * torch.tanh(scores / reading.softcap)
    least = torch.finfo(scores.dtype).min
    later = own[..., None, :] > own[..., None]
    scores[..., -own.shape[-1] :].masked_fill_(later[:, :, None], least)
    if real is not None:
        scores.masked_fill_(~real[:, :, None, None], least)
    if reading.sink_logits is None:
        return torch.softmax(scores, dim=-1)
    extra = reading.sink_logits.float().view(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]

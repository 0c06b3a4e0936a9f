"""Random layers for policies, and attention one query at a time, shared by the tests of eviction."""

from __future__ import annotations

import math
from typing import Any

import torch

from kvloom.eviction import Policy, Reading, Seen

HEAD_DIM, KV_HEADS, QUERY_HEADS = 16, 2, 6
SCALING = HEAD_DIM**-0.5


def layer(tokens: int, *, batch: int = 1, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keys, values and queries of a whole prompt; every sequence but the first is left-padded."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"keys": KV_HEADS, "values": KV_HEADS, "queries": QUERY_HEADS}
    made = {name: 2 * torch.randn(batch, h, tokens, HEAD_DIM, generator=generator) for name, h in heads.items()}
    real = torch.arange(tokens) >= padding * (torch.arange(batch) > 0).long()[:, None]
    return {**made, "real": real}


def seen(policy: Policy, *, reading: Reading | None = None, **tensors: Any) -> Seen:
    """What a cache shows the policy at the end of a prompt."""
    keys, queries, real = tensors["keys"], tensors["queries"], tensors["real"]
    batch, heads, tokens = keys.shape[:3]
    slots = torch.arange(tokens).expand(batch, heads, tokens)
    newest = queries[:, :, max(0, tokens - policy.num_queries) :]
    is_real = real[:, None].expand(batch, heads, tokens)
    reading = reading or Reading(SCALING)
    mass = None
    if policy.sums_attention:
        mass = slow_received(queries, keys, real, reading)
    return Seen(slots, is_real, tokens, newest, reading, lambda: (keys, tensors["values"]), mass)


def slow_received(
    queries: torch.Tensor, keys: torch.Tensor, real: torch.Tensor, reading: Reading, last: int | None = None
) -> torch.Tensor:
    """Attention that every token receives from the ``last`` queries, in loops: fp64 ``[batch, kv_heads, tokens]``."""
    batch, heads, tokens = keys.shape[:3]
    group = queries.shape[1] // heads
    total = torch.zeros(batch, heads, tokens, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries.shape[1]):
            for i in range(tokens - (last or tokens), tokens):
                if not real[b, i]:
                    continue
                logits = {}
                for t in range(i + 1):
                    if real[b, t]:
                        logit = float(queries[b, q, i].double() @ keys[b, q // group, t].double()) * reading.scaling
                        if reading.softcap is not None:
                            logit = reading.softcap * math.tanh(logit / reading.softcap)
                        logits[t] = logit
                norm = sum(math.exp(x) for x in logits.values())
                if reading.sink_logits is not None:
                    norm += math.exp(float(reading.sink_logits[q]))
                for t, logit in logits.items():
                    total[b, q // group, t] += math.exp(logit) / norm / group
    return total

"""Which tokens of a prompt a layer would keep, by the arithmetic and the choice of a cache that evicts."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.eviction import Reading, Room, Seen, choose, received
from kvloom.signals._tap import Tapped


def scores_of(tapped: Tapped, room: Room) -> Tensor:
    """What each token of a prompt is worth to a policy, float64 `[batch, kv_heads, tokens]`; see `Policy.scores`.

    Args:
        tapped: The kept attention of the prompt, without padding.
        room: Names the policy.
    """
    policy, scoring = room.policy, tapped.scoring
    reading = Reading(scoring.scale, scoring.softcap, scoring.sink_logits)
    batch, heads, tokens = tapped.key.shape[:3]
    slots = torch.arange(tokens, device=tapped.key.device).expand(batch, heads, -1)
    is_real, query = torch.ones_like(slots, dtype=torch.bool), tapped.query.flatten(1, 2)
    mass = received(query, tapped.key, slots, None, reading) if policy.sums_attention else None
    newest, states = query[:, :, max(0, tokens - policy.num_queries) :], (tapped.key, tapped.value)
    seen = Seen(slots, is_real, tokens, newest, reading, lambda: states, mass, all_real=True)
    return policy.scores(seen).double()


def kept_of(scores: Tensor, room: Room) -> Tensor:
    """The tokens that stay at the end of a prompt.

    Args:
        scores: `[batch, kv_heads, tokens]`; see `scores_of`.
        room: How many a layer may keep.

    Returns:
        bool, shaped like the scores.
    """
    tokens = scores.shape[-1]
    limit, sinks = room.limit(tokens), min(room.sinks, tokens)
    kept = torch.ones_like(scores, dtype=torch.bool)
    if tokens <= limit:
        return kept
    stays = torch.zeros(tokens, dtype=torch.bool, device=scores.device)
    stays[tokens - room.newest(limit) :] = True
    for start, end in room.protect:
        stays[start:end] = True
    ranked = scores.masked_fill(stays, torch.inf)[..., sinks:]
    base, units = room.split(tokens - sinks, limit, int(stays[sinks:].sum()))
    chosen = choose(ranked[..., :0], ranked, base, units, room.page_tokens, is_pooled=room.policy.is_pooled)
    kept[..., sinks:] = chosen.tail
    return kept

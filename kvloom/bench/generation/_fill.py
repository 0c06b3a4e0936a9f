"""Caches of long prompts without the prompts' passes: random keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import QuantizedCache

from kvloom.plan import Fingerprint

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Elements of one layer's keys in one update: what packing them takes besides stays small beside the cache.
FILL_ELEMENTS = 1 << 26
_LEAST_TOKENS = 64


def fill_random(cache: Cache, model: PreTrainedModel, batch: int, tokens: int) -> None:
    """Append normal keys and values to every layer, as many tokens at a time as have `FILL_ELEMENTS`.

    Args:
        cache: An empty cache; `QuantizedCache` is given everything at once, as it would be by a prompt.
        model: The model it serves.
        batch: Sequences.
        tokens: Tokens of each.
    """
    shape = Fingerprint.of(model)
    piece = max(_LEAST_TOKENS, FILL_ELEMENTS // (batch * shape.num_kv_heads * shape.head_dim))
    pieces = [tokens] if isinstance(cache, QuantizedCache) else _split(tokens, piece)
    for count in pieces:
        size = (batch, shape.num_kv_heads, count, shape.head_dim)
        key, value = (torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2))
        for layer in range(shape.num_layers):
            cache.update(key, value, layer)


def _split(tokens: int, piece: int) -> list[int]:
    return [min(piece, tokens - start) for start in range(0, tokens, piece)]

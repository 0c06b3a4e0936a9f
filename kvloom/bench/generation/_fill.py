"""Caches of long prompts without the prompts' passes: random keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import QuantizedCache
from transformers.cache_utils import CacheLayerMixin

from kvloom.cache import local_shape
from kvloom.errors import CacheError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Elements of one layer's keys in one update: what packing them takes besides stays small beside the cache.
FILL_ELEMENTS = 1 << 24
_LEAST_TOKENS = 64


def fill_random(cache: Cache, model: PreTrainedModel, batch: int, tokens: int) -> None:
    """Append normal keys and values to every layer, as many tokens at a time as have `FILL_ELEMENTS`.

    Layers are called themselves: what a cache keeps to undo a pass that fails would take memory that decoding does not.

    Args:
        cache: An empty cache; `QuantizedCache` is given everything at once, as it would be by a prompt.
        model: The model it serves.
        batch: Sequences.
        tokens: Tokens of each.

    Raises:
        CacheError: A layer holds no keys and values (linear attention).
    """
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if len(layers) < len(cache.layers):
        raise CacheError("layers without keys and values cannot be filled at random: pass a prompt (--fill prompt).")
    shape = local_shape(model)
    piece = max(_LEAST_TOKENS, FILL_ELEMENTS // (batch * shape.num_kv_heads * shape.head_dim))
    pieces = [tokens] if isinstance(cache, QuantizedCache) else _split(tokens, piece)
    for count in pieces:
        size = (batch, shape.num_kv_heads, count, shape.head_dim)
        key, value = (torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2))
        for layer in layers:
            layer.update(key, value)


def _split(tokens: int, piece: int) -> list[int]:
    return [min(piece, tokens - start) for start in range(0, tokens, piece)]

"""Caches of long prompts without the prompts' passes: random keys and values."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import QuantizedCache
from transformers.cache_utils import CacheLayerMixin

from kvloom.cache import KeptKV, LoomCache, local_shape
from kvloom.errors import CacheError
from kvloom.plan import Fingerprint

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Elements of one layer's keys in one update: what packing them takes besides stays small beside the cache.
FILL_ELEMENTS = 1 << 24
_LEAST_TOKENS = 64
_QUERIES = 512


def fill_random(cache: Cache, model: PreTrainedModel, batch: int, tokens: int) -> None:
    """Append normal keys and values to every layer, as many tokens at a time as have `FILL_ELEMENTS`.

    They are one prompt, of which layers that evict keep what normal queries of its last tokens attend to. Layers are
    called themselves, one after the other: what a cache keeps to undo a pass that fails would take memory that decoding
    does not.

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
    all_queries = model.config.get_text_config(decoder=True).num_attention_heads
    query_heads = all_queries * shape.num_kv_heads // Fingerprint.of(model).num_kv_heads
    draw = partial(torch.randn, dtype=model.dtype, device=model.device)
    if isinstance(cache, LoomCache) and tokens:
        cache.expect_prompt(tokens)
    for layer in layers:
        for count in pieces:
            size = (batch, shape.num_kv_heads, count, shape.head_dim)
            states, _ = layer.update(draw(size), draw(size))
            if isinstance(states, KeptKV):
                query = draw((batch, query_heads, min(count, _QUERIES), shape.head_dim))
                states.observe(query, scaling=shape.head_dim**-0.5, mask=None, softcap=None, sink_logits=None)


def _split(tokens: int, piece: int) -> list[int]:
    return [min(piece, tokens - start) for start in range(0, tokens, piece)]

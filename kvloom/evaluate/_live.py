"""Bytes of a cache, counted on the tensors that are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom._ledger import Record
from kvloom.cache import LoomCache
from kvloom.evaluate._contestants import Contestant
from kvloom.plan import Fingerprint

if TYPE_CHECKING:
    from transformers import Cache

_COMPUTE_BYTES = 2


def held(contestant: Contestant, cache: Cache, model: Fingerprint, batch: int = 1, prompt: int | None = None) -> Record:
    """Tokens, bytes and true bits of each sequence of a cache, as records have them.

    Tokens after the first `prompt` ones came one by one, which matters where tokens are evicted.
    """
    tokens = int(cache.get_seq_length())
    decoded = 0 if prompt is None else tokens - prompt
    return {
        "context": tokens,
        "live_bytes": grown_bytes(contestant, cache, model, decoded=decoded) // batch,
        "true_bits": true_bits(contestant, cache, model, batch, decoded=decoded),
    }


def fullest(pieces: Sequence[Record]) -> Record:
    """What the fullest of several caches held: its tokens, bytes and true bits."""
    most = max(pieces, key=lambda piece: int(piece["context"]))
    return {name: most[name] for name in ("context", "live_bytes", "true_bits")}


def live_bytes(contestant: Contestant, cache: Cache, model: Fingerprint) -> int:
    """Bytes resident for the packed layers, in this run's dtype."""
    if contestant.plan is not None:
        return int(cache.nbytes())  # type: ignore[attr-defined]
    storages = {t.untyped_storage().data_ptr(): t for t in cache_tensors(cache, model)}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def grown_bytes(contestant: Contestant, cache: Cache, model: Fingerprint, *, decoded: int = 0) -> int:
    """`live_bytes`, of a cache of fixed size those that a growing one would have: its plan's arithmetic says them.

    Args:
        contestant: whose cache.
        cache: the cache.
        model: shape of what this process holds.
        decoded: tokens that came one by one after a prompt.
    """
    if not isinstance(cache, LoomCache) or cache.max_tokens is None:
        return live_bytes(contestant, cache, model)
    layer = next(iter(cache.packed_layers.values()))
    return cache.plan.nbytes(layer.batch_size, int(cache.get_seq_length()), layer.dtype, decoded=decoded)


def true_bits(contestant: Contestant, cache: Cache, model: Fingerprint, batch: int = 1, *, decoded: int = 0) -> float:
    """8 x bytes / cached elements of `batch` sequences if the run's compute dtype were a 16-bit one.

    Counted for a plan by its own arithmetic, for any other cache on its tensors: every
    floating-point tensor (scales, zero points, exact tokens) at 2 bytes an element, whatever it is
    kept in here, and all others as they are. Where tensors do not tell, `stated_bits` does.
    """
    tokens = int(cache.get_seq_length())
    if contestant.plan is not None:
        return contestant.plan.true_bits(tokens, dtype=torch.bfloat16, decoded=decoded)
    if contestant.stated_bits is not None:
        return contestant.stated_bits(cache)
    counted = {t.data_ptr(): _sixteen_bit_nbytes(t) for t in cache_tensors(cache, model)}
    elements = batch * 2 * len(model.packed_layers) * model.num_kv_heads * tokens * model.head_dim
    return 8 * sum(counted.values()) / elements


def cache_tensors(cache: Cache, model: Fingerprint) -> Iterator[Tensor]:
    """The plain tensors of the packed layers that hold anything."""
    for layer in model.packed_layers:
        for value in vars(cache.layers[layer]).values():
            yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Plain tensors below a value; a quantised tensor (quanto's) is taken apart into its own."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        elif value.numel():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _sixteen_bit_nbytes(tensor: Tensor) -> int:
    size = _COMPUTE_BYTES if tensor.is_floating_point() else tensor.element_size()
    return tensor.numel() * size

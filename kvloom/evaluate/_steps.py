"""Decoding: one token of every sequence after another, replayed as a CUDA graph where a cache's size is fixed.

On a GPU a plan's cache has a fixed size if its steps can be replayed: not with keys before RoPE, policies that watch
steps (H2O, ceilings while decoding), layers of linear attention, batch-invariant attention, or, in a dtype without
kernels (fp32), heads of several formats and formats that attention decodes first. It holds and shows what the growing
cache does, in other storage.

A graph is captured at the third step, so that few steps are taken sooner through a growing cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.cache import INVARIANT, LoomCache, StepLayer
from kvloom.generation import serves, step_of

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from kvloom.generation import Step
    from kvloom.plan import Plan

FEWEST_STEPS = 8
"""Steps from which on a cache of fixed size is quicker."""

_BLOCK = 32
"""Steps whose scores are held together."""


def fixed_cache(plan: Plan, model: PreTrainedModel, tokens: int) -> LoomCache | None:
    """A new empty cache of fixed size for `tokens` tokens of each sequence; None where steps would not be replayed."""
    if not _has_graphs(model) or plan.needs_growing or model.config._attn_implementation == INVARIANT:
        return None
    cache = LoomCache(plan, model, max_tokens=tokens)
    return cache if all(_is_replayed(layer) for layer in cache.layers) else None


def _has_graphs(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


def _is_replayed(layer: object) -> bool:
    return isinstance(layer, StepLayer) and layer.is_graph_safe_between_pages


def logits_of(model: PreTrainedModel, cache: Cache, tokens: Tensor, **options: int) -> Tensor:
    """Logits `[batch, new, vocabulary]` of one forward pass of tokens `[batch, new]` through a cache."""
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, **options).logits
    return logits


class Steps:
    """Reads one token of every sequence at a time, behind what a cache holds.

    Args:
        model: a causal language model, with the attention that the cache wants.
        cache: any cache; one of fixed size that `kvloom.decode_loop` could use is read by replayed graphs on a GPU.
        scores: `[batch, vocabulary]`, of the token read last; only its shape and device are used.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, scores: Tensor) -> None:
        self._model = model
        self._cache = cache
        self._step: Step | None = None
        if serves(cache):
            no_pads = torch.zeros((len(scores), 0), dtype=torch.bool, device=scores.device)
            self._step = step_of(model, cache, no_pads, scores.float(), compiled=False)
            self._step.position.fill_(int(cache.get_seq_length()))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append int64 tokens `[batch]`; scores `[batch, vocabulary]` of the next ones, valid until the next call."""
        if self._step is None or not isinstance(self._cache, LoomCache):
            return logits_of(self._model, self._cache, tokens[:, None])[:, -1]
        self._step.token.copy_(tokens[:, None])
        self._step(self._cache)
        return self._step.scores

    def check(self) -> None:
        """Wait for the device, and raise what replayed steps could not raise.

        Raises:
            CacheError: see `LoomCache.check`.
        """
        if isinstance(self._cache, LoomCache):
            self._cache.check()


def stepwise_logits(model: PreTrainedModel, cache: Cache, tokens: Tensor, scores: Tensor) -> Iterator[Tensor]:
    """Feed tokens `[batch, tokens]` one by one, behind what a cache holds.

    Args:
        model: see `Steps`.
        cache: see `Steps`.
        tokens: int64 token ids.
        scores: see `Steps`.

    Yields:
        Logits `[batch, block, vocabulary]` of consecutive tokens, at most 32 together.

    Raises:
        CacheError: see `Steps.check`, before the logits of the block concerned are given.
    """
    steps = Steps(model, cache, scores)
    for block in tokens.split(_BLOCK, dim=1):
        logits = torch.stack([steps(column).clone() for column in block.unbind(1)], dim=1)
        steps.check()
        yield logits

"""Running tokens through a cache: in chunks, as a prompt, one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvloom.cache import INVARIANT, disable, enable, reads_pages
from kvloom.errors import DataError
from kvloom.evaluate._contestants import Contestant

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@contextmanager
def attention(model: PreTrainedModel, *, packed: bool) -> Iterator[None]:
    """Let the model use kvloom's attention (`packed`) or its own, and go back afterwards."""
    before = model.config._attn_implementation
    if reads_pages(before) == packed:
        yield
        return
    (enable if packed else disable)(model)
    try:
        yield
    finally:
        if packed:
            disable(model)
        else:
            enable(model, batch_invariant=before == INVARIANT)


def last_logits(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> Tensor:
    """Logits `[vocabulary]` of the last token of one forward pass of tokens `[1, new]` through the cache.

    Models that can are asked for no other token's: those of a long prompt take more memory than its cache.
    """
    many = tokens.shape[1] > 1 and "logits_to_keep" in inspect.signature(model.forward).parameters
    few = {"logits_to_keep": 1} if many else {}
    return _logits(model, cache, tokens, **few)[0, -1].clone()


def _logits(model: PreTrainedModel, cache: Cache, tokens: Tensor, **options: int) -> Tensor:
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True, **options).logits
    return logits


def chunked_logits(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, chunk: int, offset: int = 0
) -> Iterator[Tensor]:
    """Feed tokens `[batch, tokens]` in chunks, the first one longer by `offset`.

    Yields:
        Logits `[batch, chunk, vocabulary]` of each chunk, the last one maybe shorter.
    """
    yield _logits(model, cache, tokens[:, : chunk + offset])
    if tokens.shape[1] > chunk + offset:
        for piece in torch.split(tokens[:, chunk + offset :], chunk, dim=1):
            yield _logits(model, cache, piece)


class Prompt:
    """A prompt that is run at most once through the dense cache, to fill other caches from.

    A cache that is given the keys and values of the whole prompt in one update holds what it would
    hold after a forward pass of the prompt in which the prompt attended to itself exactly.

    Args:
        model: the model.
        tokens: `[1, tokens]` int64 on the model's device.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        self.tokens = tokens
        self._model = model

    @cached_property
    def _dense(self) -> tuple[Any, Tensor]:
        """The dense cache that holds the prompt, and the logits `[vocabulary]` for the token after it."""
        cache = DynamicCache(config=self._model.config)
        with attention(self._model, packed=False):
            return cache, last_logits(self._model, cache, self.tokens)

    def fill(self, contestant: Contestant) -> tuple[Cache, Tensor]:
        """A new cache of the contestant that holds the prompt.

        Returns:
            The cache, and the logits `[vocabulary]` for the token after the prompt.

        Raises:
            DataError: the contestant cannot be filled with that many tokens.
        """
        check_multiple(contestant, "prompt", self.tokens.shape[1])
        cache = contestant.make_cache()
        with attention(self._model, packed=contestant.plan is not None):
            if contestant.prefill == "quantized" or not self._shareable or contestant.evicts:
                return cache, last_logits(self._model, cache, self.tokens)
            dense, logits = self._dense
            for index, layer in enumerate(dense.layers):
                cache.update(layer.keys.clone(), layer.values.clone(), index)
        return cache, logits.clone()

    @property
    def _shareable(self) -> bool:
        """Whether every layer keeps all keys and values (a sliding window does not)."""
        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=self._model.config).layers)


@dataclass(frozen=True)
class Written:
    """A continuation, and the cache that it was decoded through.

    Attributes:
        tokens: the new token ids.
        cache: holds the prompt and all new tokens but the last.
    """

    tokens: list[int]
    cache: Cache


def greedy(
    model: PreTrainedModel,
    contestant: Contestant,
    prompt: Prompt,
    tokens: int,
    stop: frozenset[int],
    *,
    ended: Callable[[list[int]], bool] = lambda _: False,
    at_least: int = 0,
) -> Written:
    """The most probable continuation, token by token through the contestant's cache.

    Args:
        model: the model.
        contestant: whose cache.
        prompt: what is continued.
        tokens: at most so many.
        stop: token ids that end the text; not part of it.
        ended: whether the tokens so far are all that is wanted.
        at_least: so many tokens come before any of `stop`.
    """
    cache, logits = prompt.fill(contestant)
    chosen: list[int] = []
    with attention(model, packed=contestant.plan is not None):
        while len(chosen) < tokens:
            if len(chosen) < at_least:
                logits[list(stop)] = float("-inf")
            token = int(logits.argmax())
            if token in stop:
                break
            chosen.append(token)
            if ended(chosen):
                break
            if len(chosen) < tokens:
                logits = last_logits(model, cache, prompt.tokens.new_tensor([[token]]))
    return Written(chosen, cache)


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a text, as the model's generation settings say."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)


def check_multiple(contestant: Contestant, what: str, tokens: int) -> None:
    """Refuse a length that the contestant's cache cannot compress.

    Raises:
        DataError: the length is no multiple of the contestant's `token_multiple`.
    """
    if tokens % contestant.token_multiple:
        raise DataError(
            f"{contestant.name} can compress multiples of {contestant.token_multiple} tokens "
            f"only, and the {what} has {tokens}: change that length, or leave this contestant out."
        )

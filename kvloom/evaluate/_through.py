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

from kvloom._vocabulary import check_vocabulary
from kvloom.cache import INVARIANT, disable, enable, reads_pages
from kvloom.errors import DataError
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._steps import Steps, logits_of, stepwise_logits

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
    """Logits `[batch, vocabulary]` of the last tokens of one forward pass of tokens `[batch, new]` through the cache.

    Models that can are asked for no other token's: those of a long prompt take more memory than its cache.
    """
    many = tokens.shape[1] > 1 and "logits_to_keep" in inspect.signature(model.forward).parameters
    few = {"logits_to_keep": 1} if many else {}
    return logits_of(model, cache, tokens, **few)[:, -1].clone()


def chunked_logits(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, chunk: int, offset: int = 0
) -> Iterator[Tensor]:
    """Feed tokens `[batch, tokens]` in chunks, the first one longer by `offset`.

    Yields:
        Logits `[batch, chunk, vocabulary]` of each chunk, the last one maybe shorter; of chunks of one token several
        together, see `stepwise_logits`.
    """
    logits = logits_of(model, cache, tokens[:, : chunk + offset])
    yield logits
    if tokens.shape[1] <= chunk + offset:
        return
    rest = tokens[:, chunk + offset :]
    if chunk == 1:
        yield from stepwise_logits(model, cache, rest, logits[:, -1])
    else:
        yield from (logits_of(model, cache, piece) for piece in torch.split(rest, chunk, dim=1))


class Prompt:
    """A prompt that is run at most once through the dense cache, to fill other caches from.

    A cache that is given the keys and values of the whole prompt in one update holds what it would
    hold after a forward pass of the prompt in which the prompt attended to itself exactly.

    Args:
        model: the model.
        tokens: `[batch, tokens]` int64 on the model's device.

    Raises:
        DataError: a token id is not in the model's vocabulary.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        check_vocabulary(model, tokens)
        self.tokens = tokens
        self._model = model

    @cached_property
    def _dense(self) -> tuple[Any, Tensor]:
        """The dense cache that holds the prompt, and the logits `[batch, vocabulary]` for the token after it."""
        cache = DynamicCache(config=self._model.config)
        with attention(self._model, packed=False):
            return cache, last_logits(self._model, cache, self.tokens)

    def fill(self, contestant: Contestant, steps: int = 0) -> tuple[Cache, Tensor]:
        """A new cache of the contestant that holds the prompt.

        Args:
            contestant: whose cache.
            steps: tokens that are to follow one by one, at most; see `Contestant.cache_for`.

        Returns:
            The cache, and the logits `[batch, vocabulary]` for the token after the prompt.

        Raises:
            DataError: the contestant cannot be filled with that many tokens.
        """
        check_multiple(contestant, "prompt", self.tokens.shape[1])
        cache = contestant.cache_for(self.tokens.shape[1] + steps, steps)
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
    """Continuations, and the cache that they were decoded through.

    Attributes:
        tokens: the new token ids of each prompt.
        cache: holds the prompts and all new tokens of the longest continuation but its last.
    """

    tokens: list[list[int]]
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
    """The most probable continuations, token by token through the contestant's cache.

    Args:
        model: the model.
        contestant: whose cache.
        prompt: what is continued.
        tokens: at most so many.
        stop: token ids that end a text; not part of it.
        ended: whether the tokens of a text so far are all that is wanted.
        at_least: so many tokens come before any of `stop`.

    Raises:
        CacheError: what was packed is out of range.
    """
    cache, logits = prompt.fill(contestant, tokens - 1)
    texts: list[list[int]] = [[] for _ in prompt.tokens]
    writing = list(range(len(texts)))
    with attention(model, packed=contestant.plan is not None):
        steps = Steps(model, cache, logits)
        for count in range(tokens):
            if count < at_least:
                logits[:, list(stop)] = float("-inf")
            chosen = logits.argmax(-1)
            picked = chosen.tolist()
            writing = [row for row in writing if picked[row] not in stop]
            for row in writing:
                texts[row].append(picked[row])
            writing = [row for row in writing if not ended(texts[row])]
            if not writing or count + 1 == tokens:
                break
            logits = steps(chosen)
    steps.check()
    return Written(texts, cache)


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

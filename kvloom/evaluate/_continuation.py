"""Log-likelihoods of continuations, read through a contestant's cache.

Context and continuation are fed in chunks, and every token of the continuation is predicted from what the cache holds
of all tokens before it; under `prefill="exact"` the tokens of a chunk see each other, and nothing else, as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvloom._ledger import Record
from kvloom._vocabulary import check_vocabulary
from kvloom.cache import local_shape
from kvloom.errors import DataError
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._context import check_logits
from kvloom.evaluate._live import held
from kvloom.evaluate._through import attention, check_multiple, chunked_logits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class _Filled:
    """A context, all but its last token in a cache."""

    context: tuple[int, ...]
    cache: Cache


class Continuations:
    """Scores continuations; those of one context that follow each other fill a cache with it once.

    Args:
        model: a causal language model in evaluation mode.
        contestant: whose cache.
        chunk: tokens of one forward pass.
    """

    def __init__(self, model: PreTrainedModel, contestant: Contestant, chunk: int = 128) -> None:
        check_multiple(contestant, "chunk", chunk)
        if contestant.evicts:
            raise DataError(
                f"{contestant.name} evicts at the end of every chunk of a context: leave it out, or give it a plan "
                "without evict."
            )
        self._model = model
        self._contestant = contestant
        self._chunk = chunk
        self._last: _Filled | None = None

    @torch.no_grad()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Record:
        """Log-likelihood of a continuation.

        Args:
            context: token ids, at least one.
            continuation: token ids, at least one.

        Returns:
            `loglikelihood` in nats, `greedy` (whether every token of the continuation is the most probable one), and
            what the cache held at the end.

        Raises:
            DataError: either is empty, a token id is not in the model's vocabulary, or logits are not finite.
        """
        if not context or not continuation:
            raise DataError("A continuation is scored after a context: give each at least one token.")
        check_vocabulary(self._model, torch.tensor([*context, *continuation]))
        total, is_greedy = 0.0, True
        with attention(self._model, packed=self._contestant.plan is not None):
            cache = deepcopy(self._filled(tuple(context)))
            targets = torch.tensor(continuation, device=self._model.device)
            for logits in self._fed(cache, [context[-1], *continuation[:-1]]):
                own, targets = targets[: len(logits)], targets[len(logits) :]
                total += float(logits.double().log_softmax(-1).gather(1, own[:, None]).sum())
                is_greedy = is_greedy and bool((logits.argmax(-1) == own).all())
        about = held(self._contestant, cache, local_shape(self._model))
        return {"loglikelihood": total, "greedy": is_greedy, **about}

    def _filled(self, context: tuple[int, ...]) -> Cache:
        if self._last is None or self._last.context != context:
            cache = self._contestant.make_cache()
            for _ in self._fed(cache, context[:-1]):
                pass
            self._last = _Filled(context, cache)
        return self._last.cache

    def _fed(self, cache: Cache, tokens: Sequence[int]) -> Iterable[Tensor]:
        """Logits `[chunk, vocabulary]` of each chunk of tokens."""
        if tokens:
            ids = torch.tensor([list(tokens)], device=self._model.device)
            for logits in chunked_logits(self._model, cache, ids, self._chunk):
                yield check_logits(logits[0], self._contestant.name)

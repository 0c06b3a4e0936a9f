"""A model read through one contestant's cache, whose finished work is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvloom._ledger import Record, fingerprint
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._context import check_model, conditions
from kvloom.evaluate._continuation import Continuations
from kvloom.evaluate._live import fullest
from kvloom.evaluate._records import open_pieces
from kvloom.evaluate._reply import Request, replies
from kvloom.evaluate._through import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader:
    """Answers prompts and scores continuations, one at a time, so that a result depends on nothing else.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        contestant: whose cache.
        chunk: tokens of one forward pass in scoring continuations.
        out: results file, beside which finished pieces are kept; None keeps them in memory only.

    Raises:
        ModelError: the model is in training mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        contestant: Contestant,
        *,
        chunk: int = 128,
        out: Path | None = None,
    ) -> None:
        check_model(model)
        self.contestant = contestant
        self._model = model
        self._tokenizer = tokenizer
        self._continuations = Continuations(model, contestant, chunk)
        self._ledger = open_pieces(out, model)
        self._shared = {**conditions(model), **contestant.conditions, "chunk": chunk}
        self._used: list[Record] = []

    @property
    def held(self) -> Record:
        """Tokens, bytes and true bits of the fullest cache so far; nothing before there is one."""
        return fullest(self._used) if self._used else {}

    def loglikelihood(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood in nats, and whether the continuation is the greedy one; see `Continuations.score`.

        Raises:
            DataError: a part is empty, a token id is not in the model's vocabulary, or logits are not finite.
        """
        asked = {"context": list(context), "continuation": list(continuation)}
        piece = self._piece("continuation_piece", asked, lambda: self._continuations.score(context, continuation))
        return piece["loglikelihood"], piece["greedy"]

    def answer(self, prompt: Sequence[int], request: Request) -> str:
        """The greedy answer to a prompt; see `replies`.

        Raises:
            DataError: the prompt does not fit the contestant.
        """

        def work() -> Record:
            tokens = torch.tensor([list(prompt)], device=self._model.device)
            (piece,) = replies(self._model, self._tokenizer, self.contestant, Prompt(self._model, tokens), request)
            return piece

        return str(self._piece("answer_piece", {"prompt": list(prompt), **request.fields}, work)["answer"])

    def _piece(self, kind: str, asked: Record, work: Callable[[], Record]) -> Record:
        key = fingerprint({**self._shared, **asked})
        if key not in self._ledger:
            self._ledger.add(kind, key, work())
        self._used.append(self._ledger[key])
        return self._ledger[key]

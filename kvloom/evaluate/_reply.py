"""Answers to prompts of one length, through a contestant's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvloom._ledger import Record
from kvloom.cache import local_shape
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._live import held
from kvloom.evaluate._through import Prompt, greedy, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """How a prompt is to be answered.

    Attributes:
        new_tokens: an answer has at most so many.
        stop: texts that end an answer; not part of it.
        ends: texts whose last token ends an answer, as the model's own end tokens do.
        at_least: so many tokens are written before a token may end the answer.
    """

    new_tokens: int
    stop: Sequence[str] = ()
    ends: Sequence[str] = ()
    at_least: int = 0

    @property
    def fields(self) -> Record:
        """The request in JSON types."""
        return {name: value if isinstance(value, int) else list(value) for name, value in asdict(self).items()}


@torch.no_grad()
def replies(
    model: PreTrainedModel, tokenizer: Any, contestant: Contestant, prompt: Prompt, request: Request
) -> list[Record]:
    """The greedy answer to each prompt, without special tokens, and what of the cache was one prompt's at the end.

    Args:
        model: the model.
        tokenizer: the model's.
        contestant: whose cache.
        prompt: what is answered.
        request: how.

    Raises:
        DataError: the prompts do not fit the contestant.
    """

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def ended(tokens: list[int]) -> bool:
        return bool(request.stop) and any(stop in text(tokens) for stop in request.stop)

    ends = stop_tokens(model) | {tokenizer(end, add_special_tokens=False).input_ids[-1] for end in request.ends}
    written = greedy(model, contestant, prompt, request.new_tokens, ends, ended=ended, at_least=request.at_least)
    about = held(contestant, written.cache, local_shape(model), *prompt.tokens.shape)
    return [{"answer": _before(text(tokens), request.stop), **about} for tokens in written.tokens]


def _before(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        answer = answer.partition(stop)[0]
    return answer

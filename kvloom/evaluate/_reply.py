"""One answer to one prompt, through a contestant's cache."""

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
def reply(model: PreTrainedModel, tokenizer: Any, contestant: Contestant, prompt: Prompt, request: Request) -> Record:
    """The greedy answer, without special tokens, and what the cache held at its end.

    Args:
        model: the model.
        tokenizer: the model's.
        contestant: whose cache.
        prompt: what is answered.
        request: how.

    Raises:
        DataError: the prompt does not fit the contestant.
    """

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def ended(tokens: list[int]) -> bool:
        return bool(request.stop) and any(stop in text(tokens) for stop in request.stop)

    ends = stop_tokens(model) | {tokenizer(end, add_special_tokens=False).input_ids[-1] for end in request.ends}
    written = greedy(model, contestant, prompt, request.new_tokens, ends, ended=ended, at_least=request.at_least)
    answer = text(written.tokens)
    for stop in request.stop:
        answer = answer.partition(stop)[0]
    return {"answer": answer, **held(contestant, written.cache, local_shape(model), prompt.tokens.shape[1])}

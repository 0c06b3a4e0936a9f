"""Every prompt answered through every contestant's cache; finished answers are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kvloom._ledger import Ledger, Record, fingerprint
from kvloom.errors import DataError
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._context import conditions, tokens_hash
from kvloom.evaluate._reply import Request, replies
from kvloom.evaluate._through import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    contestants: Sequence[Contestant],
    request: Request,
    ledger: Ledger,
    progress: Callable[[int, Contestant, int, int], None],
    batch: int = 1,
) -> list[list[Record]]:
    """Answer what the ledger has no answers to yet.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        prompts: token ids of each.
        contestants: whose caches.
        request: how prompts are answered.
        ledger: of finished answers.
        progress: told the prompt, the contestant, what is done and the total before every piece of work.
        batch: prompts of one length in one forward pass. With 1 an answer depends on nothing else; with more, sums are
            rounded otherwise.

    Returns:
        For each contestant the `replies` to all prompts, in order.

    Raises:
        DataError: the batch is empty, or a prompt does not fit a contestant.
    """
    if batch < 1:
        raise DataError(f"batch is {batch}: answer at least one prompt at a time.")
    shared = {**conditions(model), **request.fields}
    answers: list[dict[int, Record]] = [{} for _ in contestants]
    done, total = 0, len(prompts) * len(contestants)
    for places in _of_one_length(prompts, batch):
        tokens = torch.tensor([list(prompts[place]) for place in places])
        hashes, prompt = [tokens_hash(row[None]) for row in tokens], Prompt(model, tokens.to(model.device))
        for contestant, answered in zip(contestants, answers, strict=True):
            progress(places[0], contestant, done, total)
            own = {**shared, **contestant.conditions}
            keys = [fingerprint({**own, "prompt": each}) for each in hashes]
            ledger.fill("answer_piece", keys, partial(replies, model, tokenizer, contestant, prompt, request))
            answered.update((place, ledger[key]) for place, key in zip(places, keys, strict=True))
            done += len(places)
    return [[answered[place] for place in range(len(prompts))] for answered in answers]


def _of_one_length(prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Places of prompts that go together."""
    places: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(len(prompt), []).append(place)
    for same in places.values():
        yield from (same[first : first + batch] for first in range(0, len(same), batch))

"""Samples: what the model writes through each cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvloom._ledger import Record, fingerprint
from kvloom.errors import DataError
from kvloom.evaluate._contestants import Contestant, check_names
from kvloom.evaluate._context import Progress, check_model, silent, surroundings
from kvloom.evaluate._records import write_records
from kvloom.evaluate._through import Prompt, greedy, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def samples(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    contestants: Sequence[Contestant],
    *,
    tokens: int = 64,
    name: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Continue a text greedily through each contestant's cache.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        prompt: what is continued.
        contestants: whose caches.
        tokens: at most so many new ones.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same contestants and prompt are replaced.
        progress: told before every piece of work.

    Returns:
        One `sample` record for each contestant; `tokens` is the number written.

    Raises:
        DataError: the prompt has no tokens, or does not fit a contestant.
        ModelError: the model is in training mode.
    """
    check_names(contestants)
    check_model(model)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise DataError("The prompt is empty: give a text to continue.")
    filled = Prompt(model, ids.to(model.device))
    where = surroundings(model, name)
    records: list[Record] = []
    for done, contestant in enumerate(contestants):
        progress(f"writing with {contestant.name}", done, len(contestants))
        (written,) = greedy(model, contestant, filled, tokens, stop_tokens(model)).tokens
        records.append(
            {
                "kind": "sample",
                "id": fingerprint([contestant.identity, where["model"], prompt, tokens]),
                **contestant.labels,
                "prompt": prompt,
                "text": tokenizer.decode(written),
                "tokens": len(written),
                **where,
            }
        )
    progress("written", len(contestants), len(contestants))
    if out:
        write_records(out, records)
    return records

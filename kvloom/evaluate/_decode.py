"""Decode speed: seconds of one token's forward pass through each contestant's cache, paired."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom._ledger import Record, fingerprint
from kvloom._vocabulary import check_vocabulary
from kvloom.errors import DataError
from kvloom.evaluate._bootstrap import median_interval
from kvloom.evaluate._contestants import Contestant, check_names
from kvloom.evaluate._context import Progress, check_model, silent, surroundings
from kvloom.evaluate._records import write_records
from kvloom.evaluate._through import Prompt, attention, last_logits

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

WARM_UP = 2
SEED = 0


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel,
    tokens: Tensor,
    contestants: Sequence[Contestant],
    *,
    context: int = 2048,
    steps: int = 32,
    name: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Time decoding at a context length.

    Every contestant's cache is filled with the prompt once. Then, in every round, each contestant
    decodes the same true token, in an order drawn anew for every round, so that whatever else the
    machine does meets all of them alike. The first two rounds are not timed.

    Args:
        model: a causal language model in evaluation mode.
        tokens: int64 token ids `[tokens]` of real text, at least `context + 2 + steps`.
        contestants: what is timed.
        context: tokens of the prompt.
        steps: timed rounds.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same contestants are replaced.
        progress: told before every piece of work.

    Returns:
        One `decode` record for each contestant: `tokens_per_s` is the inverse of the median step
        time, with its 95 % interval; `step_s` the times in the order of the rounds, so that
        `paired_speed` can compare.

    Raises:
        DataError: the text is too short or another model's tokenizer's, or a contestant cannot hold that prompt.
        ModelError: the model is in training mode.
    """
    check_names(contestants)
    check_model(model)
    if tokens.dim() != 1 or len(tokens) < context + WARM_UP + steps or min(context, steps) < 1:
        raise DataError(
            f"tokens has shape {list(tokens.shape)}, and {context} tokens of context with "
            f"{WARM_UP} + {steps} steps need {context + WARM_UP + steps} tokens of one text: give "
            "a longer text, or fewer steps."
        )
    check_vocabulary(model, tokens)
    total = len(contestants) + WARM_UP + steps
    tokens = tokens.to(model.device)
    progress("prompt", 0, total)
    prompt = Prompt(model, tokens[None, :context])
    caches: list[Cache] = []
    for done, contestant in enumerate(contestants):
        progress(f"filling {contestant.name}", done, total)
        caches.append(prompt.fill(contestant)[0])
    seconds: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    draw = random.Random(SEED)
    for round_ in range(WARM_UP + steps):
        progress("decoding", len(contestants) + round_, total)
        token = tokens[None, context + round_, None]
        draw.shuffle(order)
        for index in order:
            taken = _timed_step(model, contestants[index], caches[index], token)
            if round_ >= WARM_UP:
                seconds[index].append(taken)
    progress("timed", total, total)
    common = {"context": context, "steps": steps, "threads": torch.get_num_threads()}
    where = surroundings(model, name)
    run = fingerprint([where, common, seconds])
    records = [
        {
            "kind": "decode",
            "id": fingerprint([contestant.identity, common, where["model"], where["device"]]),
            **contestant.labels,
            **common,
            "tokens_per_s": _rate(times),
            "step_s": [round(time, 6) for time in times],
            "run": run,
            **where,
        }
        for contestant, times in zip(contestants, seconds, strict=True)
    ]
    if out:
        write_records(out, records)
    return records


def _timed_step(model: PreTrainedModel, contestant: Contestant, cache: Cache, token: Tensor) -> float:
    with attention(model, packed=contestant.plan is not None):
        _finish(model)
        started = perf_counter()
        last_logits(model, cache, token)
        _finish(model)
        return perf_counter() - started


def _finish(model: PreTrainedModel) -> None:
    """Wait until the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _rate(times: Sequence[float]) -> dict[str, float]:
    median = median_interval(list(times))
    return {"value": 1 / median.value, "low": 1 / median.high, "high": 1 / median.low}

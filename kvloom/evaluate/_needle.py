"""Needle in a haystack: is one fact, far back in the prompt, still found through the cache?

One sentence with a number is hidden at a depth of a text that has nothing to do with it, and the
model is asked for the number (after the NIAH task of RULER, arXiv 2404.06654). The prompt attends
to itself exactly unless the plan says otherwise; the answer is decoded through the cache.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom._ledger import Record, fingerprint
from kvloom.errors import DataError
from kvloom.evaluate._asking import ask
from kvloom.evaluate._contestants import Contestant, check_names
from kvloom.evaluate._context import Progress, check_model, reads_at_most, silent, surroundings
from kvloom.evaluate._live import fullest
from kvloom.evaluate._mean_score import mean_score
from kvloom.evaluate._records import open_pieces, write_results
from kvloom.evaluate._reply import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.1, 0.5, 0.9)
SEEDS = (0, 1)
NEW_TOKENS = 16

CITIES = (
    "Amsterdam Barcelona Cairo Dublin Geneva Helsinki Istanbul Jakarta Lisbon Madrid Nairobi Oslo"
    " Prague Rome Seoul Tokyo Vienna Warsaw"
).split()

_NEEDLE = " One of the special magic numbers for {city} is: {number}."
_TASK = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards.\n"
)
_QUESTION = "\nWhat is the special magic number for {city} mentioned in the provided text?"
_ANSWER = "The special magic number for {city} mentioned in the provided text is"
_HAY = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class NeedleCase:
    """One question.

    Attributes:
        tokens: length of the prompt.
        depth: where in the haystack the needle lies, 0 (start) to 1 (end).
        seed: of the city, the number and the start of the haystack.
    """

    tokens: int
    depth: float
    seed: int

    @property
    def city(self) -> str:
        """The city that the needle is about."""
        return self._random("city").choice(CITIES)

    @property
    def number(self) -> str:
        """The seven digits to find."""
        return str(self._random("number").randrange(10**6, 10**7))

    def start(self, sentences: int) -> int:
        """Index of the first sentence of the haystack."""
        return self._random("start").randrange(sentences)

    def _random(self, what: str) -> random.Random:
        return random.Random(f"{what} {self.tokens} {self.depth} {self.seed}")


def needle_cases(
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    seeds: Sequence[int] = SEEDS,
) -> list[NeedleCase]:
    """Every combination of length, depth and seed."""
    return [NeedleCase(*values) for values in product(lengths, depths, seeds)]


def needle_prompt(tokenizer: Any, haystack: str, case: NeedleCase) -> Tensor:
    """The prompt of a case, of exactly `case.tokens` tokens.

    The needle goes between two sentences; the last sentence of the haystack is cut where the length
    is reached.

    Args:
        tokenizer: the model's; its chat template is used if it has one.
        haystack: text without needles, repeated from its start where it ends.
        case: what is asked.

    Returns:
        int64 `[1, tokens]`.

    Raises:
        DataError: the length leaves no room for a haystack, or there is no text.
    """
    head, tail = _frame(tokenizer, case)
    needle = _tokens(tokenizer, _NEEDLE.format(city=case.city, number=case.number))
    room = case.tokens - len(head) - len(tail) - len(needle)
    sentences = re.split(r"(?<=[.!?])\s+", haystack.strip())
    if room < 1 or not any(sentences):
        raise DataError(
            f"A needle prompt of {case.tokens} tokens has no room for a haystack of "
            f"{len(haystack)} characters: give a longer prompt and a text."
        )
    hay: list[int] = []
    ends = [0]
    index = case.start(len(sentences))
    while len(hay) < room:
        hay += _tokens(tokenizer, " " + sentences[index % len(sentences)])
        ends.append(min(len(hay), room))
        index += 1
    at = min(ends, key=lambda end: abs(end - case.depth * room))
    return torch.tensor([[*head, *hay[:at], *needle, *hay[at:room], *tail]])


@torch.no_grad()
def needle(
    model: PreTrainedModel,
    tokenizer: Any,
    haystack: str,
    contestants: Sequence[Contestant],
    *,
    cases: Sequence[NeedleCase] | None = None,
    name: str | None = None,
    out: Path | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> list[Record]:
    """Ask every contestant every question, answered greedily in at most 16 tokens.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        haystack: text to hide needles in.
        contestants: whose caches.
        cases: what is asked, by default 18 cases of 1K, 2K and 4K tokens.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same contestants and cases are replaced, and answered
            cases are kept beside it, in `<out>.pieces`, so that a run that was killed goes on where
            it stopped.
        batch: cases of one length in one forward pass; see `ask`.
        progress: told before every piece of work.

    Returns:
        One `needle` record for each contestant; a case is `found` if its seven digits are in the
        answer, and `score` is the share found with its interval. Bytes and true bits are those of
        the fullest cache.

    Raises:
        DataError: see `needle_prompt`; or a length does not fit a contestant or the model.
        ModelError: the model is in training mode.
    """
    cases = needle_cases() if cases is None else cases
    check_names(contestants)
    check_model(model)
    _check_lengths(model, cases)
    prompts: list[list[int]] = [needle_prompt(tokenizer, haystack, case)[0].tolist() for case in cases]

    def tell(place: int, contestant: Contestant, done: int, total: int) -> None:
        progress(f"{cases[place].tokens} tokens, depth {cases[place].depth}, {contestant.name}", done, total)

    answers = ask(
        model,
        tokenizer,
        prompts,
        contestants,
        Request(NEW_TOKENS),
        open_pieces(out, model),
        tell,
        batch,
    )
    progress("answered", len(cases) * len(contestants), len(cases) * len(contestants))
    where = surroundings(model, name)
    records = [
        _record(contestant, cases, answered, where) for contestant, answered in zip(contestants, answers, strict=True)
    ]
    write_results(out, records, model)
    return records


def _check_lengths(model: PreTrainedModel, cases: Sequence[NeedleCase]) -> None:
    longest, reads = max(case.tokens for case in cases) + NEW_TOKENS, reads_at_most(model)
    if reads and longest > reads:
        raise DataError(
            f"needle takes {longest} tokens of prompt and answer, and the model reads {reads}: give smaller lengths."
        )


def _record(contestant: Contestant, cases: Sequence[NeedleCase], answers: Sequence[Record], where: Record) -> Record:
    found = [case.number in piece["answer"] for case, piece in zip(cases, answers, strict=True)]
    asked = [[case.tokens, case.depth, case.seed] for case in cases]
    return {
        "kind": "needle",
        "id": fingerprint([contestant.identity, where["model"], where["device"], asked]),
        **contestant.labels,
        "cases": [
            {**asdict(case), "found": is_found, "answer": piece["answer"]}
            for case, is_found, piece in zip(cases, found, answers, strict=True)
        ],
        "found": sum(found),
        "total": len(found),
        "score": mean_score([float(is_found) for is_found in found]),
        **fullest(answers),
        **where,
    }


def _frame(tokenizer: Any, case: NeedleCase) -> tuple[list[int], list[int]]:
    """Tokens before and after the haystack."""
    question = _TASK + _HAY + _QUESTION.format(city=case.city)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    else:
        text = question + "\n"
    before, after = (text + _ANSWER.format(city=case.city)).split(_HAY)
    return _tokens(tokenizer, before), _tokens(tokenizer, after)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids

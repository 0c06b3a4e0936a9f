"""Questions on the packaged essays, in LongBench's schema, for where its own data cannot be had.

Each question has one short answer, in a sentence that the essay says once. Its document is a stretch of the essays in
alphabetical order, with that sentence at a depth that differs from question to question. Documents are cut so that all
prompts have as many tokens of a model, and can be answered together.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.assets import EVALUATION, texts
from kvloom.errors import DataError

SET = "multifieldqa_en"
"""LongBench's set of questions on single documents of any kind: its prompt, its metric (F1 of words)."""


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        found: what an essay says once, where the answer is.
        asked: the question.
        answers: what counts as an answer; the best one does.
    """

    found: str
    asked: str
    answers: tuple[str, ...]


QUESTIONS = (
    Question(
        "This was in 9th grade", "In which grade was the author when he wrote his first programs?", ("9th grade",)
    ),
    Question(
        "sold as a kit by Heathkit",
        "Which company sold the kit of the microcomputer that his friend built?",
        ("Heathkit",),
    ),
    Question(
        "a TRS-80, in about 1980", "Which computer did the author's father buy in about 1980?", ("TRS-80", "a TRS-80")
    ),
    Question(
        "a novel by Heinlein",
        "Which novel by Heinlein made the author want to work on AI?",
        ("The Moon is a Harsh Mistress",),
    ),
    Question("The default language at Cornell", "What was the default programming language at Cornell?", ("PL/I",)),
    Question("Only Harvard accepted me", "Which grad school accepted the author?", ("Harvard",)),
    Question(
        "I reverse-engineered SHRDLU", "What did the author reverse-engineer for his undergraduate thesis?", ("SHRDLU",)
    ),
    Question("$16,000 a month", "How much did Viaweb pay a PR firm each month?", ("$16,000", "$16,000 a month")),
    Question(
        "called John McArtyem", "Which name stood for Robert Morris on Viaweb's Company page?", ("John McArtyem",)
    ),
    Question(
        "my friend Robert Morris and I started a startup called Viaweb",
        "With whom did the author start Viaweb in 1995?",
        ("Robert Morris", "his friend Robert Morris"),
    ),
    Question(
        "Fred Brooks wrote about it in 1974", "Who wrote about variation in productivity in 1974?", ("Fred Brooks",)
    ),
    Question(
        "from Silicon Valley to Buffalo",
        "Which city would become Silicon Valley if the right ten thousand people moved there?",
        ("Buffalo",),
    ),
    Question("I grew up in Pittsburgh", "In which city did the author grow up?", ("Pittsburgh",)),
    Question(
        "high-tech community in Seattle",
        "Which university yielded a high-tech community in Seattle?",
        ("the University of Washington", "University of Washington"),
    ),
    Question(
        "83,000 people came to sit",
        "How many people came to sit in the driver's seat of Wufoo's form-builder?",
        ("83,000", "83,000 people"),
    ),
    Question(
        "almost half a million unique visitors",
        "How many unique visitors a month does Reddit have?",
        ("almost half a million", "half a million"),
    ),
    Question("A herd of impalas might have", "How many adults might a herd of impalas have?", ("100", "100 adults")),
    Question(
        "I've now worked with over 200 of them",
        "How many startup founders has the author worked with?",
        ("over 200", "200"),
    ),
    Question(
        "I was in Africa last year", "On which continent did the author see animals in the wild last year?", ("Africa",)
    ),
    Question(
        "give Berkeley's Principles of Human Knowledge",
        "Which book by Berkeley would the author give another shot in college?",
        ("Principles of Human Knowledge", "Berkeley's Principles of Human Knowledge"),
    ),
    Question(
        "Sam Altman's startup class",
        "In whose startup class at Stanford was the guest lecture given?",
        ("Sam Altman", "Sam Altman's"),
    ),
    Question("It's like skiing in that way", "Which sport does the author compare startups with?", ("skiing",)),
    Question(
        "when I was about 9 or 10",
        "How old was the author when his father told him he could be whatever he wanted?",
        ("about 9 or 10", "9 or 10"),
    ),
    Question(
        "establish a new class of visa",
        "For whom should the government establish a new class of visa?",
        ("startup founders",),
    ),
)
DEPTHS = (0.5, 0.1, 0.7, 0.3, 0.9)
"""Of the answers in their documents, in turn."""
AROUND = ".\n\n", "\n\nNow"
"""What the prompt has around a document, parts of which may share a token with it."""
CHARACTERS_A_TOKEN = 4.6
"""Of the essays, about; it says only where documents begin."""


def rows(tokenizer: Any, tokens: int) -> list[dict[str, object]]:
    """Rows of LongBench's schema. Each document and its question have so many tokens, so that prompts are as long.

    Raises:
        DataError: the essays do not say what a question asks for exactly once, or are too short.
    """
    text = "\n\n".join(" ".join(source.content.split()) for source in texts(EVALUATION))
    return [_row(number, question, text, tokenizer, tokens) for number, question in enumerate(QUESTIONS)]


def _row(number: int, question: Question, text: str, tokenizer: Any, tokens: int) -> dict[str, object]:
    if text.count(question.found) != 1:
        raise DataError(f"the essays say {question.found!r} {text.count(question.found)} times: a question needs once.")
    room = tokens - _count(tokenizer, f" {question.asked}")
    characters = int(CHARACTERS_A_TOKEN * room)
    ahead = int(DEPTHS[number % len(DEPTHS)] * characters)
    start = max(0, min(text.index(question.found) - ahead, len(text) - characters))
    context = text[start : _end(text, start, tokenizer, room)]
    return {
        "_id": f"essays-{number}",
        "input": question.asked,
        "context": context,
        "answers": list(question.answers),
        "length": len(context.split()),
        "dataset": SET,
        "language": "en",
        "all_classes": None,
    }


def _end(text: str, start: int, tokenizer: Any, tokens: int) -> int:
    """Where a stretch from `start` on ends that has so many tokens with what is around it."""
    longest = text[start : start + 6 * tokens]
    ends = tokenizer(longest, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    if len(ends) <= tokens:
        raise DataError(f"the essays have no {tokens} tokens behind character {start}: ask for fewer.")
    before, behind = AROUND
    for _, stop in ends[tokens::-1]:
        if _count(tokenizer, before + longest[:stop] + behind) == tokens:
            return start + stop
    raise DataError(f"no stretch behind character {start} of the essays has {tokens} tokens: ask for another number.")


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def write_rows(folder: Path, tokenizer: Any, tokens: int) -> Path:
    """Write the rows where `kvloom.evaluate.Settings(data=folder)` looks for them.

    Raises:
        DataError: see `rows`.
    """
    file = folder / "longbench" / f"{SET}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_suffix(f".{os.getpid()}")  # other shares may read it
    own.write_text("".join(json.dumps(row) + "\n" for row in rows(tokenizer, tokens)), encoding="utf-8")
    return own.replace(file)

"""Needles in a haystack: eight of RULER's sub-tasks."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Literal

from kvloom.errors import DataError
from kvloom.evaluate.tasks.ruler._sub_task import Draft, SubTask
from kvloom.evaluate.tasks.ruler._words import word_pair

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""Sentences that are repeated, one round of them a line."""

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{one} afterwards.\n{context}\nWhat is the special magic {one} for {query} mentioned in the provided text?",
    " The special magic {one} for {query} mentioned in the provided text is",
)
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
_DEPTHS = tuple(round(100 * place / 39) for place in range(40))


@dataclass(frozen=True)
class Niah(SubTask):
    """Find the values of keys that are hidden in a text.

    Attributes:
        name: as published.
        haystack: essays, repeated noise, or other needles.
        key: what keys are.
        value: what values are.
        keys: how many are hidden.
        values: how many each key has.
        queries: how many keys are asked for.
        essays: words of the essays, for that haystack.
    """

    name: str
    haystack: Literal["noise", "essay", "needle"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    essays: Sequence[str] = ()
    new_tokens: int = 128

    def among(self, essays: Sequence[str]) -> Niah:
        """The same sub-task in the words of essays."""
        return replace(self, essays=essays)

    def draft(self, random: Random, index: int, room: int, tokenizer: Any) -> Draft:
        """See `SubTask.draft`; a unit is a word of an essay, or a sentence."""
        hidden = {self._drawn(random, self.key): self._values(random) for _ in range(self.keys)}
        needles = [self._needle(key, value) for key, values in hidden.items() for value in values]
        random.shuffle(needles)
        asked = random.sample(list(hidden), self.queries)
        query = ", ".join(asked[:-1]) + (", and " if asked[1:] else "") + asked[-1]
        question, opening = _ONE if self.queries * self.values == 1 else _MANY
        said = {"kind": self.value, "one": self.value[:-1], "query": query}
        context = self._context(random, needles)
        return Draft(
            question=lambda units: question.format(context=context(units), **said),
            opening=opening.format(**said),
            references=[value for key in asked for value in hidden[key]],
            least=len(needles),
        )

    def _values(self, random: Random) -> list[str]:
        return [self._drawn(random, self.value) for _ in range(self.values)]

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value, key=key, value=value)

    @staticmethod
    def _drawn(random: Random, kind: str) -> str:
        if kind == "words":
            return word_pair(random)
        if kind == "numbers":
            return str(random.randrange(10**6, 10**7))
        return str(uuid.UUID(int=random.getrandbits(128), version=4))

    def _context(self, random: Random, needles: list[str]) -> Callable[[int], str]:
        """The text with so many units of haystack around the needles."""
        if self.haystack == "essay":
            depths = sorted(random.sample(_DEPTHS, len(needles)))
            return partial(_in_essays, self.essays, needles, depths)
        places = sorted(random.random() for _ in needles)
        if self.haystack == "noise":
            return partial(_in_noise, needles, places)
        seed = random.random()
        return lambda units: "\n".join(inserted(self._distractors(seed, units), needles, places))

    def _distractors(self, seed: float, count: int) -> list[str]:
        random = Random(seed)
        return [self._needle(self._drawn(random, self.key), self._drawn(random, self.value)) for _ in range(count)]


def noise_lines(sentences: int) -> list[str]:
    """So many sentences of noise, a round of five on a line; the last line may be shorter."""
    rounds, rest = divmod(sentences, len(NOISE))
    return [" ".join(NOISE)] * rounds + ([" ".join(NOISE[:rest])] if rest else [])


def inserted(lines: list[str], needles: Sequence[str], places: Sequence[float]) -> list[str]:
    """Lines with needles, in order, before the lines at `places` (rising, from 0 to 1)."""
    for needle, place in zip(reversed(needles), reversed(places), strict=True):
        lines.insert(int(place * len(lines)), needle)
    return lines


def essay_words(texts: Sequence[str]) -> list[str]:
    """Words of texts.

    Raises:
        DataError: there are none.
    """
    words = " ".join(texts).split()
    if not words:
        raise DataError("The haystack has no words: give texts to hide needles in.")
    return words


def _in_noise(needles: Sequence[str], places: Sequence[float], units: int) -> str:
    return "\n".join(inserted(noise_lines(units), needles, places))


def _in_essays(essays: Sequence[str], needles: Sequence[str], depths: Sequence[int], units: int) -> str:
    """Needles between the sentences of so many words of essays, which start again where they end."""
    rounds = -(-units // len(essays))
    sentences = re.split(r"(?<=[.!?])\s+", " ".join((list(essays) * rounds)[:units]))
    parts: list[str] = []
    start = 0
    for needle, depth in zip(needles, depths, strict=True):
        end = len(sentences) * depth // 100
        parts += [*sentences[start:end], needle]
        start = end
    return " ".join([*parts, *sentences[start:]])


NIAH = (
    Niah("niah_single_1", "noise"),
    Niah("niah_single_2", "essay"),
    Niah("niah_single_3", "essay", value="uuids"),
    Niah("niah_multikey_1", "essay", keys=4),
    Niah("niah_multikey_2", "needle"),
    Niah("niah_multikey_3", "needle", key="uuids", value="uuids"),
    Niah("niah_multivalue", "essay", values=4),
    Niah("niah_multiquery", "essay", keys=4, queries=4),
)
"""The eight, as published; those of essays have none yet."""

"""Common words: which words of a numbered list come most often."""

from __future__ import annotations

from random import Random
from typing import Any

from kvloom.evaluate.tasks.ruler._sub_task import Draft, SubTask
from kvloom.evaluate.tasks.ruler._words import single_words, word_pair

_COMMON = 10
_QUESTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_OPENING = " Answer: The top 10 words that appear most often in the list are:"
_SHORT = 4096
"""Lengths below it have fewer repetitions."""


class CommonWords(SubTask):
    """Ten words come 30 times and all others 3 times (6 times and once below 4K), after a worked example.

    Where the published lists have no more words, adjective-noun pairs follow.
    """

    name = "cwe"
    new_tokens = 120

    def draft(self, random: Random, index: int, room: int, tokenizer: Any) -> Draft:
        """See `SubTask.draft`; a unit is another word with its repetitions."""
        example, counts = ((20, 3, 1), (6, 1)) if room < _SHORT else ((40, 10, 3), (30, 3))
        words = _Words(random, *example[1:])
        shown = f"{words.question(example[0])}{_OPENING} {_numbered(words.common)}\n"
        asked = _Words(random, *counts)
        return Draft(lambda units: shown + asked.question(units), _OPENING, asked.common, least=_COMMON + 1)


class _Words:
    """Words drawn once, so that a longer list holds the shorter one's."""

    def __init__(self, random: Random, often: int, seldom: int) -> None:
        self._often = often
        self._seldom = seldom
        self._order = random.random()
        self._pairs = Random(random.random())
        self._drawn = random.sample(single_words(), len(single_words()))
        self.common = self._drawn[:_COMMON]

    def question(self, words: int) -> str:
        while len(self._drawn) < words:
            self._drawn.append(word_pair(self._pairs))
        listed = self.common * self._often + self._drawn[_COMMON:words] * self._seldom
        Random(self._order).shuffle(listed)
        return _QUESTION.format(context=_numbered(listed))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))

"""Frequent words: which three of many made-up words come most often."""

from __future__ import annotations

import math
from random import Random
from string import ascii_lowercase
from typing import Any

from kvloom.evaluate.tasks.ruler._sub_task import Draft, SubTask

_LETTERS = 6
_ALPHA = 2
_ZETA = math.pi**2 / 6
"""Riemann's zeta of `_ALPHA`."""

_QUESTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_OPENING = " Answer: According to the coded text above, the three most frequently appeared words are:"


class FrequentWords(SubTask):
    """Words as often as a zeta distribution of exponent 2 has them; the most frequent one is dots, and is ignored."""

    name = "fwe"
    new_tokens = 50

    def draft(self, random: Random, index: int, room: int, tokenizer: Any) -> Draft:
        """See `SubTask.draft`; a unit is a word, of which those that round to no whole number are left out."""
        vocabulary = ["..."]
        while len(vocabulary) < max(4, (room - self.new_tokens) // 50):
            word = "".join(random.choices(ascii_lowercase, k=_LETTERS))
            vocabulary += [word] if word not in vocabulary else []
        seed = random.random()

        def question(units: int) -> str:
            words = [
                word for rank, word in enumerate(vocabulary, start=1) for _ in range(int(units / rank**_ALPHA / _ZETA))
            ]
            Random(seed).shuffle(words)
            return _QUESTION.format(context=" ".join(words))

        return Draft(question, _OPENING, vocabulary[1:4], least=60)

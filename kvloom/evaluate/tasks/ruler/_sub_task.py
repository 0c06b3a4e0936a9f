"""What the sub-tasks of RULER have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from kvloom.evaluate.metrics import match_all


@dataclass(frozen=True)
class Draft:
    """A question whose text can be made longer.

    Attributes:
        question: the prompt with so many units of text; more units, more text, the same answers.
        opening: how the answer begins.
        references: right answers.
        least: units that the prompt needs.
    """

    question: Callable[[int], str]
    opening: str
    references: Sequence[str]
    least: int


class SubTask(ABC):
    """One of the 13.

    Attributes:
        name: as published.
        new_tokens: tokens of an answer, as published.
    """

    name: str
    new_tokens: int

    @abstractmethod
    def draft(self, random: Random, index: int, room: int, tokenizer: Any) -> Draft:
        """A question.

        Args:
            random: what is drawn is drawn from it.
            index: of the question.
            room: tokens of prompt and answer.
            tokenizer: the model's.
        """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """What an answer scores, from 0 to 1."""
        return match_all(answer, references)

"""One question of a task, and what the answer should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        name: tells it from the task's other cases.
        prompt: token ids.
        references: right answers.
        classes: what the answer is chosen from, if it is.
    """

    name: str
    prompt: Sequence[int]
    references: Sequence[str]
    classes: Sequence[str] = ()

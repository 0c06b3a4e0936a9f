"""RULER's string matches (arXiv 2404.06654)."""

from __future__ import annotations

import re
from collections.abc import Sequence


def match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains, whatever the case of letters."""
    return sum(_contained(answer, references)) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains any of the references, whatever the case of letters, else 0."""
    return float(any(_contained(answer, references)))


def _contained(answer: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference is in the answer; control characters count as ends of lines."""
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return [reference.lower() in text for reference in references]

"""LongBench's edit similarity of code (arXiv 2308.14508)."""

from __future__ import annotations

from difflib import SequenceMatcher

_NO_CODE = ("`", "#", "//")


def edit_similarity(answer: str, reference: str) -> float:
    """Similarity of the answer's first line of code with the reference, rounded to hundredths.

    A line of code holds neither a backtick nor the start of a comment; without one the answer is empty. The similarity
    is `difflib`'s ratio, as `fuzzywuzzy.fuzz.ratio` takes it.
    """
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    return round(100 * SequenceMatcher(None, code, reference).ratio()) / 100

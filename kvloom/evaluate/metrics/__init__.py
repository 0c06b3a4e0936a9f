"""Scores of one answer against references, as the benchmarks define them; one file a metric, all from 0 to 1."""

from __future__ import annotations

from kvloom.evaluate.metrics._classification import classification
from kvloom.evaluate.metrics._edit import edit_similarity
from kvloom.evaluate.metrics._f1 import normalised_words, token_f1
from kvloom.evaluate.metrics._match import match_all, match_part
from kvloom.evaluate.metrics._numbers import exact_match, last_number, share_of_number, stated_number
from kvloom.evaluate.metrics._rouge import rouge_l

__all__ = [
    "classification",
    "edit_similarity",
    "exact_match",
    "last_number",
    "match_all",
    "match_part",
    "normalised_words",
    "rouge_l",
    "share_of_number",
    "stated_number",
    "token_f1",
]

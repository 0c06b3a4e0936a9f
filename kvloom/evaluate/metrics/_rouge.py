"""ROUGE-L (Lin 2004, *ROUGE: A Package for Automatic Evaluation of Summaries*)."""

from __future__ import annotations

from functools import cache
from typing import Any

from kvloom._extras import require


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, by `rouge-score`, without stemming.

    LongBench's own script takes another package, `rouge`, which splits at spaces only and joins the subsequences of
    sentences, so its values differ.

    Raises:
        MissingExtraError: the `tasks` extra is not installed.
    """
    measured: float = _scorer().score(reference, answer)["rougeL"].fmeasure
    return measured


@cache
def _scorer() -> Any:
    require("tasks", "ROUGE-L")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)

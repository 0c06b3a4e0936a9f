"""F1 of words, as in SQuAD (arXiv 1606.05250) and LongBench (arXiv 2308.14508)."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation and without the articles a, an, the."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of common words in the answer and in the reference; 0 without a common word."""
    ours, theirs = normalised_words(answer), normalised_words(reference)
    common = (Counter(ours) & Counter(theirs)).total()
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)

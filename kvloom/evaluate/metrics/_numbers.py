"""Numbers in answers: GSM8K's exact match, LongBench's counts and retrieved paragraphs."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def last_number(text: str) -> str:
    """The last number of a text as it is written, "" if there is none (lm-eval's `flexible-extract`)."""
    found = _NUMBER.findall(text)
    return found[-1] if found else ""


def stated_number(text: str, statement: str) -> str:
    """What the group of the pattern `statement` first matches, "" if it does not (lm-eval's `strict-match`)."""
    found = re.search(statement, text)
    return found[1].strip() if found else ""


def exact_match(answer: str, reference: str) -> float:
    """1 if two numbers are written alike but for commas, dollar signs, a last full stop and all up to "#### "."""
    return float(_bare(answer) == _bare(reference))


def share_of_number(answer: str, number: str) -> float:
    """Share of the whole numbers in an answer that are this one; 0 without any (LongBench, arXiv 2308.14508)."""
    found = re.findall(r"\d+", answer)
    return found.count(number) / len(found) if found else 0.0


def _bare(number: str) -> str:
    for pattern in _IGNORED:
        number = re.sub(pattern, "", number)
    return number.lower()

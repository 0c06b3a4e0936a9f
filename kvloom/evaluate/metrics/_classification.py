"""LongBench's classification score (arXiv 2308.14508)."""

from __future__ import annotations

from collections.abc import Sequence


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, if the reference is one of them; else 0.

    Classes whose name is a part of the reference's do not count, except that, as in the published scorer, the class
    that follows such a one in the list is not looked at.

    Args:
        answer: what the model wrote.
        reference: the right class.
        classes: all classes.
    """
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            del named[at]
        at += 1
    return 1 / len(named) if reference in named else 0.0

"""How many tokens fit into so many bytes."""

from __future__ import annotations

from collections.abc import Callable

STEP = 1024
"""Contexts are told in whole steps of so many tokens: the pages of all steps are filled alike."""

MOST = STEP * 2**17
"""Longer contexts are not told apart."""

GPUS = {"24 GB": 24 * 10**9, "48 GB": 48 * 10**9, "80 GB": 80 * 10**9}
"""Memories that contexts are told for, in bytes."""


def longest_context(nbytes: Callable[[int], int], room: int) -> int:
    """The longest context that fits, in tokens: a multiple of `STEP`, at most `MOST`.

    Args:
        nbytes: Bytes at a context of so many tokens; they do not fall from step to step.
        room: Bytes there are.
    """
    fits, too_long, steps = 0, MOST // STEP + 1, 1
    while too_long - fits > 1:
        size = nbytes(steps * STEP)
        if size <= room:
            fits = steps
        else:
            too_long = steps
        steps = min(max(steps * room // size, fits + 1), too_long - 1)
    return fits * STEP

"""Prompts of one length, no two of which begin alike."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvloom.errors import DataError


def draw_prompts(tokens: Sequence[int], count: int, length: int, seed: int) -> list[list[int]]:
    """Cut pieces out of a text, each from another place on, so that no server has seen the start of one before.

    Args:
        tokens: Token ids of the text.
        count: Prompts.
        length: Tokens of each.
        seed: Of the draw.

    Returns:
        Token ids of each prompt.

    Raises:
        DataError: A number is not positive, or the text is too short.
    """
    if min(count, length) < 1:
        raise DataError(f"{count} prompts of {length} tokens: give numbers above 0.")
    places = max(0, len(tokens) - length + 1)
    if places < count:
        raise DataError(
            f"{count} prompts of {length} tokens cannot begin at different places of a text of {len(tokens)} tokens: "
            "give more text, or ask for fewer or shorter prompts."
        )
    starts = random.Random(seed).sample(range(places), count)
    return [list(tokens[start : start + length]) for start in starts]

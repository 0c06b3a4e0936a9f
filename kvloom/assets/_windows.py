"""Token windows cut from texts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from kvloom.assets._texts import Text
from kvloom.errors import DataError

if TYPE_CHECKING:
    import torch


def token_windows(tokenizer: Any, texts: Iterable[Text], window: int, count: int | None, seed: int) -> torch.Tensor:
    """Draw `count` windows of `window` tokens that do not overlap.

    The texts are tokenised one by one and joined; the joined tokens are cut into whole windows, and
    `count` of them are drawn without replacement and kept in text order. When the tokenizer begins
    every text with a beginning-of-sequence token, so does every window.

    Args:
        tokenizer: of the model that will read the windows.
        texts: where the tokens come from.
        window: tokens in one window.
        count: windows; None for all that there are.
        seed: of the draw.

    Returns:
        int64 token ids `[count, window]`.

    Raises:
        DataError: the texts are too short.
    """
    import torch

    start = _start_tokens(tokenizer)
    body = window - len(start)
    tokens = list(chain.from_iterable(_tokenise(tokenizer, text) for text in texts))
    available = len(tokens) // body if body > 0 else 0
    count = max(1, available) if count is None else count
    if min(window, count) < 1 or available < count:
        raise DataError(
            f"{count} windows of {window} tokens were asked for, but the texts hold {len(tokens)} "
            f"tokens, which is {available} such windows: give more text, or ask for fewer or "
            "shorter windows, and at least one."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(available, generator=generator)[:count].sort().values
    windows = torch.tensor(tokens[: available * body]).view(available, body)[drawn]
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), windows], dim=1)


def _start_tokens(tokenizer: Any) -> list[int]:
    """The tokens that this tokenizer puts before a text: `[bos]` or nothing."""
    empty = tokenizer("").input_ids
    return [tokenizer.bos_token_id] if empty[:1] == [tokenizer.bos_token_id] else []


def _tokenise(tokenizer: Any, text: Text) -> list[int]:
    ids: list[int] = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
    return ids

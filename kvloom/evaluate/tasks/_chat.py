"""Prompts as the model's tokens, in its chat template if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvloom.errors import DataError

_ROLES = ("user", "assistant")


def prompt_tokens(tokenizer: Any, turns: Sequence[str], opening: str = "", *, chat: bool = True) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: the model's.
        turns: what the user and the assistant say in turn; the first and the last are the user's.
        opening: how the answer begins; it follows at once.
        chat: use the tokenizer's chat template, if it has one; without one a single turn is plain text.

    Raises:
        DataError: there are several turns and no chat template.
    """
    if chat and tokenizer.chat_template:
        said = [{"role": _ROLES[place % 2], "content": text} for place, text in enumerate(turns)]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return _tokens(tokenizer, text + opening, special=False)
    if len(turns) > 1:
        raise DataError("The tokenizer has no chat template, which a prompt of several turns needs: use a chat model.")
    return _tokens(tokenizer, turns[0] + opening, special=True)


def _tokens(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    return ids

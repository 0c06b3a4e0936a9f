"""What keys or values read back as once they are packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvloom import codecs
from kvloom.pages import Format, page_tokens_of

if TYPE_CHECKING:
    from kvloom.cache import Rope


def storage_error(packed: Tensor, fmt: Format) -> Tensor:
    """Decoded minus original: float32 `[batch, kv_heads, tokens, head_dim]`, whole pages."""
    return codecs.as_stored(packed, fmt, page_tokens_of(fmt)) - packed.float()


def state_error(states: Tensor, packed: slice, fmt: Format, rope: Rope | None) -> Tensor:
    """What storing changes in the keys or values that attention sees, for the packed tokens.

    Args:
        states: As cached, `[batch, kv_heads, tokens, head_dim]`.
        packed: Tokens in full pages.
        fmt: How they are stored.
        rope: The model's rotary embedding; needed if the format is for keys before it.

    Returns:
        float32 `[batch, kv_heads, packed tokens, head_dim]`.
    """
    if rope is None or not fmt.pre_rope:
        return storage_error(states[:, :, packed], fmt)
    before = rope.before(states[:, :, packed].float(), packed.start)
    return rope.after(storage_error(before, fmt), packed.start)


def as_read(states: Tensor, packed: slice, fmt: Format, rope: Rope | None) -> Tensor:
    """All keys or values, the packed ones as stored; float32, shaped like the states."""
    read = states.float().clone()
    read[:, :, packed] += state_error(states, packed, fmt, rope)
    return read

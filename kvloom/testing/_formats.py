"""The formats a codec is checked in."""

from __future__ import annotations

from kvloom.codecs import Codec
from kvloom.pages import Format, Grouping

HEAD_DIM = 64
Groups = tuple[Grouping, int]
_GROUPS: tuple[Groups, ...] = (
    ("per_channel", 16),
    ("per_channel", 128),
    ("per_token", 16),
)
_CACHED_GROUPS: tuple[Groups, ...] = (("per_channel", 64), ("per_token", HEAD_DIM))


def codec_formats(codec: Codec) -> list[Format]:
    """Every width the codec takes, symmetric too if it takes that, in groups of several sizes along both axes."""
    return [
        Format(bits, grouping, size, symmetric, codec.name)
        for bits in codec.facts.bits
        for grouping, size in _GROUPS
        for symmetric in ((False, True) if codec.facts.symmetric else (False,))
    ]


def cache_formats(codec: Codec) -> list[Format]:
    """Every width the codec takes, along either axis: each bit plane and each order of parameters is met."""
    return [
        Format(bits, grouping, size, grouping == "per_token" and codec.facts.symmetric, codec.name)
        for bits in codec.facts.bits
        for grouping, size in _CACHED_GROUPS
    ]

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
    """Every width the codec takes, with and without zero points as it takes them, in groups of several sizes."""
    return [
        Format(bits, grouping, size, symmetric, codec.name)
        for bits in codec.facts.bits
        for grouping, size in _taken(codec, _GROUPS)
        for symmetric in codec.facts.symmetries
    ]


def cache_formats(codec: Codec) -> list[Format]:
    """Every width the codec takes, along either axis: each bit plane and each order of parameters is met."""
    symmetries = codec.facts.symmetries
    return [
        Format(bits, grouping, size, symmetric, codec.name)
        for bits in codec.facts.bits
        for (grouping, size), symmetric in zip(
            _taken(codec, _CACHED_GROUPS), (symmetries[0], symmetries[-1]), strict=False
        )
    ]


def _taken(codec: Codec, groups: tuple[Groups, ...]) -> tuple[Groups, ...]:
    """The groups, or the only ones that the codec has."""
    size = codec.facts.group_size
    return groups if size is None else (("per_channel", size),)

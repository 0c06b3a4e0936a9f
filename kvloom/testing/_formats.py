"""The formats a codec is checked in."""

from __future__ import annotations

from kvloom.codecs import Codec
from kvloom.pages import Codebook, Format, Grouping

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
        Format(bits, grouping, size, symmetric, codec.name, codebook=_codebook(codec, bits))
        for bits in codec.facts.bits
        for grouping, size in _taken(codec, _GROUPS)
        for symmetric in codec.facts.symmetries
    ]


def cache_formats(codec: Codec) -> list[Format]:
    """Every width the codec takes, along either axis: each bit plane and each order of parameters is met."""
    symmetries = codec.facts.symmetries
    return [
        Format(bits, grouping, size, symmetric, codec.name, codebook=_codebook(codec, bits))
        for bits in codec.facts.bits
        for (grouping, size), symmetric in zip(
            _taken(codec, _CACHED_GROUPS), (symmetries[0], symmetries[-1]), strict=False
        )
    ]


def _codebook(codec: Codec, bits: int) -> Codebook | None:
    """What a calibration might give: uneven, on no side of zero alike, and short of the ends."""
    if not codec.facts.is_calibrated:
        return None
    even = [(2 * i + 1) / 2**bits - 1 for i in range(2**bits)]
    return tuple(0.9 * x * abs(x) + 0.05 for x in even)


def _taken(codec: Codec, groups: tuple[Groups, ...]) -> tuple[Groups, ...]:
    """The groups, or the only ones that the codec has."""
    size = codec.facts.group_size
    return groups if size is None else (("per_channel", size),)

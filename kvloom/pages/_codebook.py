"""Codebooks: the points that codes stand for, as plain numbers, so that nobody needs the codec to look them up.

Points are fp16 numbers, rounded here and nowhere else, so that codecs and kernels mean the same ones: a point times a
scale is then exact in fp32.
"""

from __future__ import annotations

import struct
from functools import lru_cache

Codebook = tuple[float, ...]
"""``2**bits`` points in rising order."""

POINT_BYTES = 2
CODEBOOK_BITS = 4

# The 2**bits points that keep standard normal numbers with the least mean squared error (the source is with
# kvloom.codecs' lloyd), positive halves by bits; each is the mean of the numbers nearest to it.
_NORMAL_HALVES = (
    (0.797885,),
    (0.452780, 1.510418),
    (0.245094, 0.756005, 1.343909, 2.151946),
    (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
)


@lru_cache(maxsize=1024)
def in_fp16(points: Codebook) -> Codebook:
    """The nearest fp16 numbers."""
    layout = f"<{len(points)}e"
    return struct.unpack(layout, struct.pack(layout, *points))


NORMAL_CODEBOOKS: tuple[Codebook, ...] = tuple((*(-x for x in reversed(half)), *half) for half in _NORMAL_HALVES)
"""Lloyd-Max grids of standard normal numbers at 1 to 4 bits."""

"""Fragment order: where the code of one element lies inside a bit plane.

A plane is a matrix whose columns are the contraction axis of the attention product: keys are ``[tokens, channels]``
(contracted over channels with Q), values are ``[channels, tokens]`` (contracted over tokens with P). It is cut into
16-row tiles, the A operand of ``mma.m16n8k16``. Within a tile, lane ``4*g + t`` holds rows ``g`` and ``g + 8``; its
fields are pairs of columns, one in each half of a 32-bit word, so that unpacking is a mask (``page-format.md``,
"Layout").

Bytes run ``[chunk][lane 32][word]``: a chunk is as few tiles as make a lane's share whole 16-byte loads (8, or 4, where
the number of tiles allows no better), and a lane's words hold, low bits first, tile after tile, row-half after
row-half, pair after pair. Element ``h`` of pair ``p`` sits at bit ``bits*j + 16*h`` of its word, ``j`` counting the
pairs of the word. Pair ``p`` of thread ``t`` is columns ``t*cols/4 + 2p + h`` of a key and ``8p + 2t + h`` of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from kvloom.pages._format import Role

TILE_ROWS = 16
LANES = 32


@dataclass(frozen=True)
class Plane:
    """Geometry of one bit plane of one page and KV head.

    Attributes:
        role: ``key`` (rows are tokens) or ``value`` (rows are channels).
        rows: Rows of the matrix, a multiple of 16.
        cols: Columns, the contraction axis, a multiple of 16.
        bits: 1, 2, 4 or 8.
        shift: Weight of the plane in the code: a plane value ``v`` stands for ``v << shift``.
        offset: First byte of the plane within the page record.
    """

    role: Role
    rows: int
    cols: int
    bits: int
    shift: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the plane: no padding, ``rows * cols * bits / 8``."""
        return self.rows * self.cols * self.bits // 8

    @property
    def tiles(self) -> int:
        """16-row tiles of the plane."""
        return self.rows // TILE_ROWS

    @property
    def fields_per_byte(self) -> int:
        """Codes in one byte."""
        return 8 // self.bits

    @cached_property
    def tiles_per_chunk(self) -> int:
        """Fewest tiles whose share of a lane is a whole number of 16-byte (else 8-, else 4-byte) loads."""
        lane_bytes = self.cols * self.bits // TILE_ROWS
        divisors = [n for n in range(1, self.tiles + 1) if self.tiles % n == 0]
        for load in (16, 8, 4):
            for n in divisors:
                if n * lane_bytes % load == 0:
                    return n
        raise AssertionError("a lane's share of a whole plane is always whole words")  # rows >= 64 or cols >= 64

    @property
    def is_byte_separable(self) -> bool:
        """Whether no byte mixes two rows, so that bytes can be reordered before they are unpacked."""
        return self.cols * self.bits % 64 == 0


@lru_cache(maxsize=256)
def source_index(plane: Plane) -> npt.NDArray[np.int64]:
    """Row-major element index ``row * cols + col`` of every field, in the order of the plane's bytes.

    Returns:
        int64 ``[nbytes, fields_per_byte]``; field ``i`` of a byte is at its bit ``bits * i``.
    """
    pairs = plane.cols // 8
    per_word = 16 // plane.bits
    words = plane.tiles_per_chunk * 2 * pairs // per_word
    chunk, lane, word, half, field = np.indices(
        (plane.tiles // plane.tiles_per_chunk, LANES, words, 2, per_word), dtype=np.int64
    )
    sequence = word * per_word + field
    stream, pair = sequence // pairs, sequence % pairs
    tile, row_half = chunk * plane.tiles_per_chunk + stream // 2, stream % 2
    g, t = lane // 4, lane % 4
    row = TILE_ROWS * tile + 8 * row_half + g
    col = t * (plane.cols // 4) + 2 * pair if plane.role == "key" else 8 * pair + 2 * t
    index: npt.NDArray[np.int64] = (row * plane.cols + col + half).reshape(plane.nbytes, plane.fields_per_byte)
    return index

"""What the Triton kernels know of a page at compile time: the layout, cut to power-of-two tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from kvloom.pages import PageLayout, Plane, SideLayout

# Rows times columns times groups of an accumulator: with twice as many, four warps run out of registers.
_ACCUMULATOR = 2048
# Columns of the smallest matrix product; fewer query rows are padded.
MIN_COLUMNS = 8


@dataclass(frozen=True)
class PlaneTile:
    """A bit plane as ``[chunks][lanes 32][words][halves 2]`` of 16-bit units of ``16 / bits`` fields.

    Attributes:
        offset: First byte within the page record.
        bits: Width of a field.
        shift: Weight of the plane in the code.
        pairs: Pairs of columns in a row of a lane.
        chunks: Chunks of the plane.
        chunk_tiles: 16-row tiles of a chunk.
        words: 32-bit words of a lane in a chunk.
        is_flat: Whether the units are a permutation of index bits of the padded matrix, and a field's bit within
            its byte depends on its column only; otherwise elements are gathered one by one.
    """

    offset: int
    bits: int
    shift: int
    pairs: int
    chunks: int
    chunk_tiles: int
    words: int
    is_flat: bool

    @property
    def mask(self) -> int:
        """Bits of one field."""
        return (1 << self.bits) - 1

    @property
    def fields(self) -> int:
        """Fields of a unit."""
        return 16 // self.bits

    @property
    def units(self) -> int:
        """16-bit units of the plane."""
        return self.chunks * 64 * self.words


@dataclass(frozen=True)
class SideTile:
    """The keys' or values' part of a page, as a matrix contracted over its columns.

    Attributes:
        is_key: Rows are tokens and columns channels; for values the other way round.
        rows: Rows, padded to a power of two; ``real_rows`` of them exist.
        cols: Columns, padded to a power of two; ``real_cols`` of them exist.
        is_raw: The elements are kept as they came, ``[tokens, channels]``; no planes, no parameters.
        planes: Bit planes, low bits first.
        params_offset: First byte of the parameters or of the raw elements.
        per_channel: Groups are tokens of one channel; otherwise channels of one token.
        groups: Groups along the grouped axis, padded to a power of two; ``real_groups`` of them exist.
        symmetric: There is no zero point.
        levels: Largest code.
        has_codebook: Codes stand for points of a codebook, which is a kernel's argument.
        zero_factor: What multiplies the loaded zero point: a symmetric grid's is a multiple of its scale.
    """

    is_key: bool
    rows: int
    real_rows: int
    cols: int
    real_cols: int
    is_raw: bool
    planes: tuple[PlaneTile, ...]
    params_offset: int
    per_channel: bool
    group_size: int
    groups: int
    real_groups: int
    symmetric: bool
    levels: int
    has_codebook: bool
    zero_factor: float

    @property
    def num_planes(self) -> int:
        """Number of planes."""
        return len(self.planes)

    @property
    def head_dim(self) -> int:
        """Channels."""
        return self.real_cols if self.is_key else self.real_rows

    @property
    def tokens(self) -> int:
        """Tokens of a page."""
        return self.real_rows if self.is_key else self.real_cols

    @property
    def span(self) -> int:
        """Parameters of one group index: channels for ``per_channel``, tokens for ``per_token``."""
        return self.head_dim if self.per_channel else self.tokens

    @property
    def is_padded(self) -> bool:
        """Whether parameters must be loaded under a mask."""
        return (self.rows, self.cols, self.groups) != (self.real_rows, self.real_cols, self.real_groups)

    @property
    def headroom(self) -> int:
        """A number below two to this power, times a scale and the weight of a plane, is within fp16.

        A scale is at most ``2 * 65504 / levels``; with a codebook 65504, and planes have no weights.
        """
        if self.is_raw or self.has_codebook:
            return 0
        return math.floor(math.log2(self.levels / 2 ** (self.planes[-1].shift + 1)))

    @property
    def unit(self) -> float:
        """What products in half precision are in units of: codes are subnormals there, points are themselves."""
        return 1.0 if self.has_codebook else 2.0**24


@lru_cache(maxsize=256)
def side_tile(side: SideLayout) -> SideTile:
    """Tile of one side."""
    is_key = side.role == "key"
    rows, cols = (side.page_tokens, side.head_dim) if is_key else (side.head_dim, side.page_tokens)
    fmt = side.fmt
    groups = 1 if fmt.is_passthrough else side.groups
    return SideTile(
        is_key=is_key,
        rows=next_power(rows),
        real_rows=rows,
        cols=next_power(cols),
        real_cols=cols,
        is_raw=fmt.is_passthrough,
        planes=tuple(_plane_tile(plane) for plane in side.planes),
        params_offset=side.params_offset,
        per_channel=fmt.grouping == "per_channel",
        group_size=fmt.group_size,
        groups=next_power(groups),
        real_groups=groups,
        symmetric=fmt.symmetric,
        levels=fmt.levels,
        has_codebook=fmt.form == "codebook",
        zero_factor=fmt.symmetric_zero if fmt.symmetric else 1.0,
    )


def _plane_tile(plane: Plane) -> PlaneTile:
    pairs = plane.cols // 8
    powers = next_power(plane.rows) == plane.rows and next_power(plane.cols) == plane.cols
    return PlaneTile(
        offset=plane.offset,
        bits=plane.bits,
        shift=plane.shift,
        pairs=pairs,
        chunks=plane.tiles // plane.tiles_per_chunk,
        chunk_tiles=plane.tiles_per_chunk,
        words=plane.tiles_per_chunk * pairs * plane.bits // 8,
        is_flat=powers and plane.is_byte_separable,
    )


def row_tile(layout: PageLayout, rows: int) -> int:
    """Query rows that one program serves, a power of two from 8 up."""
    key, value = side_tile(layout.key), side_tile(layout.value)
    widest = max(key.rows * key.groups, value.rows * value.groups)
    return max(MIN_COLUMNS, min(next_power(rows), _ACCUMULATOR // widest))


def next_power(n: int) -> int:
    """Smallest power of two not below ``n``."""
    return 1 << (n - 1).bit_length()

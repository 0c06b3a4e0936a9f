"""The page record: which bytes hold codes, scales and zero points. Pure arithmetic, no tensors.

One record a KV head and page: key planes, key parameters, key outliers, then the same of values. Every part is a
multiple of 16 bytes long, so nothing is padded. Parameters are fp16: ``per_channel`` as ``scale[groups][head_dim]``
then ``zero[groups][head_dim]``; ``per_token`` as ``[groups][page_tokens]`` of (scale, zero) pairs, scale alone when
symmetric. Outliers are ``index[count]`` in uint16, rising, then ``value[count]`` in fp16; an index is ``token *
head_dim + channel`` within the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvloom.errors import PlanError
from kvloom.pages._format import Format, Role, check_format, page_tokens_of
from kvloom.pages._fragment import Plane

PARAM_BYTES = 2
OUTLIER_BYTES = 4
_OUTLIER_STEP = 4
_INDICES = 2**16


@dataclass(frozen=True)
class SideLayout:
    """Keys' or values' part of a page record.

    Attributes:
        offset: First byte of the side within the record.
        planes: Bit planes, low bits first; empty for a passthrough.
        params_offset: First byte of the parameters (of the raw elements for a passthrough).
        num_outliers: Elements kept beside the codes.
        outliers_offset: First byte of theirs, where the parameters end.
        nbytes: Bytes of the whole side.
    """

    role: Role
    fmt: Format
    page_tokens: int
    head_dim: int
    offset: int
    planes: tuple[Plane, ...]
    params_offset: int
    num_outliers: int
    outliers_offset: int
    nbytes: int

    @property
    def groups(self) -> int:
        """Groups along the grouped axis: tokens for ``per_channel``, channels for ``per_token``."""
        span = self.page_tokens if self.fmt.grouping == "per_channel" else self.head_dim
        return -(-span // self.fmt.group_size)

    @property
    def rows(self) -> int:
        """Rows of the side as a matrix: tokens of keys, channels of values."""
        return self.page_tokens if self.role == "key" else self.head_dim

    @property
    def cols(self) -> int:
        """Its columns, over which attention contracts."""
        return self.head_dim if self.role == "key" else self.page_tokens


@dataclass(frozen=True)
class PageLayout:
    """Where everything lies in the page record of one KV head."""

    key: SideLayout
    value: SideLayout
    page_tokens: int
    head_dim: int
    nbytes: int

    @property
    def is_readable(self) -> bool:
        """Whether attention reads both sides in place, without their codecs; see `CodecFacts`."""
        return "opaque" not in (self.key.fmt.form, self.value.fmt.form)


def num_outliers(fmt: Format, head_dim: int, page_tokens: int) -> int:
    """Elements of one side of one page of one KV head that are kept in fp16: whole 16 bytes of them, if any at all."""
    if fmt.is_passthrough or not fmt.outliers:
        return 0
    return max(1, round(fmt.outliers * page_tokens * head_dim / _OUTLIER_STEP)) * _OUTLIER_STEP


def side_nbytes(fmt: Format, head_dim: int, page_tokens: int, itemsize: int = 2) -> int:
    """Bytes of one side of one page of one KV head; ``itemsize`` is the compute dtype's (passthrough only)."""
    elements = page_tokens * head_dim
    if fmt.is_passthrough:
        return elements * itemsize
    along, across = (page_tokens, head_dim) if fmt.grouping == "per_channel" else (head_dim, page_tokens)
    params = -(-along // fmt.group_size) * across * fmt.num_params * PARAM_BYTES
    return elements * fmt.bits // 8 + params + num_outliers(fmt, head_dim, page_tokens) * OUTLIER_BYTES


def page_nbytes(key: Format, value: Format, head_dim: int, page_tokens: int, itemsize: int = 2) -> int:
    """Bytes of one page record of one KV head, scales, zero points and outliers counted."""
    return side_nbytes(key, head_dim, page_tokens, itemsize) + side_nbytes(value, head_dim, page_tokens, itemsize)


@lru_cache(maxsize=1024)
def page_layout(key: Format, value: Format, head_dim: int, itemsize: int = 2, page_tokens: int = 0) -> PageLayout:
    """Layout of a page record.

    Args:
        key: Format of the keys.
        value: Format of the values.
        head_dim: Channels of a head, a multiple of 16.
        itemsize: Bytes of the compute dtype, for passthrough sides.
        page_tokens: Tokens in a page; 0 takes the smallest page these formats allow. A layer whose heads differ
            passes the largest, since a layer's heads share their page boundaries.

    Raises:
        PlanError: A format does not fit ``head_dim``.
    """
    tokens = page_tokens or page_tokens_of(key, value)
    sides: tuple[tuple[Format, Role], ...] = ((key, "key"), (value, "value"))
    for fmt, role in sides:
        check_format(fmt, head_dim, role)
        _check_indices(fmt, head_dim, tokens)
    key_side = _side("key", key, tokens, head_dim, 0, itemsize)
    value_side = _side("value", value, tokens, head_dim, key_side.nbytes, itemsize)
    return PageLayout(key_side, value_side, tokens, head_dim, key_side.nbytes + value_side.nbytes)


def _side(role: Role, fmt: Format, tokens: int, head_dim: int, offset: int, itemsize: int) -> SideLayout:
    rows, cols = (tokens, head_dim) if role == "key" else (head_dim, tokens)
    planes: list[Plane] = []
    at, shift = offset, 0
    for bits in fmt.planes:
        planes.append(Plane(role, rows, cols, bits, shift, at))
        at, shift = at + planes[-1].nbytes, shift + bits
    nbytes, count = side_nbytes(fmt, head_dim, tokens, itemsize), num_outliers(fmt, head_dim, tokens)
    ends = offset + nbytes - count * OUTLIER_BYTES
    return SideLayout(role, fmt, tokens, head_dim, offset, tuple(planes), at, count, ends, nbytes)


def _check_indices(fmt: Format, head_dim: int, tokens: int) -> None:
    if num_outliers(fmt, head_dim, tokens) and tokens * head_dim > _INDICES:
        raise PlanError(
            f"outliers are found by 16-bit indices, and a page of {tokens} tokens and head_dim {head_dim} has more "
            f"than {_INDICES} elements: choose a smaller per_channel group_size, or leave outliers out."
        )

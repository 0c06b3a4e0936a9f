"""Codes and parameters to page bytes and back, in torch.

`pack_side` and `unpack_side` move whole sides, but for outliers; `side_matrix` is what attention reads: the codes as
floats, in an order that costs a byte permutation and a few whole-word operations, together with the order and weight of
its columns; or, in natural order, the points that the codes of a codebook stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from kvloom.pages._codebook import Codebook
from kvloom.pages._fragment import LANES, Plane, source_index
from kvloom.pages._layout import SideLayout

_WIDE = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@lru_cache(maxsize=1024)
def codebook_points(points: Codebook, device: torch.device) -> torch.Tensor:
    """`Format.points` on a device, fp16 ``[2**bits]``: one tensor for all who ask."""
    return torch.tensor(points, dtype=torch.float16, device=device)


@lru_cache(maxsize=256)
def _source(plane: Plane, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(source_index(plane)).to(device)


@lru_cache(maxsize=256)
def _inverse(plane: Plane, device: torch.device) -> torch.Tensor:
    return torch.argsort(_source(plane, device).flatten())


def pack_plane(codes: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Bytes of one plane.

    Args:
        codes: uint8 ``[..., rows, cols]``, the full codes; the plane takes its own bits of them.
        plane: Geometry.

    Returns:
        uint8 ``[..., plane.nbytes]``.
    """
    own = ((codes >> plane.shift) & (2**plane.bits - 1)).flatten(-2)
    source = _source(plane, codes.device)
    fields = own.gather(-1, source.flatten().expand(*own.shape[:-1], -1)).view(*own.shape[:-1], *source.shape)
    packed: torch.Tensor = fields[..., 0].clone()
    for i in range(1, plane.fields_per_byte):
        packed |= fields[..., i] << (plane.bits * i)
    return packed


def side_matrix(
    pages: torch.Tensor, side: SideLayout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the scales of a side multiply, spread over whatever columns are cheapest to unpack.

    That is codes; with a codebook, their points. A field keeps the place it has in its byte, and a code in several
    planes keeps its parts apart: the code of column ``c`` is the sum of ``weight * number`` over the stored columns
    whose natural index is ``c``. Points have a column each.

    Args:
        pages: uint8 ``[..., record bytes]``.
        side: Layout; not a passthrough.
        dtype: dtype of the result.

    Returns:
        ``[..., rows, planes * cols]`` of ``dtype``; the int64 ``[planes * cols]`` natural index of each stored column;
        and its weight, a power of two, likewise in ``dtype``.
    """
    if side.fmt.form == "codebook":
        points = codebook_points(side.fmt.points, pages.device).to(dtype)
        matrix = points.index_select(0, _codes(pages, side).flatten().int()).view(*pages.shape[:-1], -1, side.cols)
        return matrix, torch.arange(side.cols, device=pages.device), points.new_ones(side.cols)
    parts = [_numbers(pages[..., plane.offset : plane.offset + plane.nbytes], plane) for plane in side.planes]
    numbers = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (numbers.to(dtype), *_stored_columns(side, dtype, pages.device))


def _numbers(data: torch.Tensor, plane: Plane) -> torch.Tensor:
    """A byte for every field of a plane, ``[..., nbytes]`` to ``[..., rows, cols]``."""
    return _spread(_row_bytes(data, plane), plane.bits) if plane.is_byte_separable else _natural(data, plane)


@lru_cache(maxsize=256)
def _stored_columns(side: SideLayout, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural index and weight of the columns of `side_matrix`."""
    columns = torch.cat([_column_order(plane, device) for plane in side.planes])
    exponents = torch.cat([_exponents(plane) for plane in side.planes])
    return columns, torch.pow(2.0, exponents).to(dtype=dtype, device=device)


def _exponents(plane: Plane) -> torch.Tensor:
    places = torch.arange(plane.cols) % plane.fields_per_byte * plane.bits
    return plane.shift - (places if plane.is_byte_separable else torch.zeros_like(places))


def _natural(data: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Plane values, uint8 ``[..., rows, cols]`` in natural order; inverse of `pack_plane` for ``shift`` 0."""
    shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=data.device)
    fields = ((data.unsqueeze(-1) >> shifts) & (2**plane.bits - 1)).flatten(-2)
    by_row = fields.gather(-1, _inverse(plane, data.device).expand(fields.shape))  # 3 x faster than indexing
    natural: torch.Tensor = by_row.unflatten(-1, (plane.rows, plane.cols))
    return natural


def _row_bytes(data: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Bytes of a byte-separable plane by row: ``[..., nbytes]`` to ``[..., rows, cols * bits / 8]``, any dtype."""
    per_half = plane.cols * plane.bits // 64  # bytes of one row in one half of a lane's words
    chunks, tiles = plane.tiles // plane.tiles_per_chunk, plane.tiles_per_chunk
    lead = data.shape[:-1]
    if per_half % 2 == 0:
        run = per_half * 2
        wide = next(w for w in (8, 4, 2, 1) if run % w == 0) if data.dtype == torch.uint8 else 1
        words = data.view(_WIDE[wide]) if wide > 1 else data
        lanes = words.reshape(-1, chunks, 8, 4, tiles, 2, run // wide).permute(0, 1, 4, 5, 2, 3, 6)
        return lanes.contiguous().view(data.dtype).view(*lead, plane.rows, -1)
    halves = data.reshape(-1, chunks, LANES, tiles * per_half, 2, 2).transpose(-2, -3)
    lanes = halves.reshape(-1, chunks, 8, 4, 2, tiles, 2, per_half)
    return lanes.permute(0, 1, 5, 6, 2, 3, 4, 7).reshape(*lead, plane.rows, -1)


@dataclass(frozen=True)
class RowRuns:
    """Where the bytes of a plane's rows lie, for code that walks them itself.

    Attributes:
        starts: int32 ``[rows, row bytes / run]``, offsets within the plane.
        run: Bytes that lie together.
        order: int32 ``[fields, row bytes]``, the natural column of every field.
    """

    starts: torch.Tensor
    run: int
    order: torch.Tensor


@cache
def row_runs(plane: Plane) -> RowRuns:
    """The runs of a byte-separable plane."""
    at = _row_bytes(torch.arange(plane.nbytes), plane)
    fits = (n for n in (16, 8, 4, 2, 1) if at.shape[1] % n == 0)
    run = next(n for n in fits if bool((at.unflatten(1, (-1, n)).diff(dim=-1) == 1).all()))
    order = _column_order(plane, at.device).view(-1, plane.fields_per_byte).T
    return RowRuns(at[:, ::run].int().contiguous(), run, order.int().contiguous())


# Integer as wide as the numbers of a byte's fields together; the factor that repeats the byte in each of its bytes;
# the mask that leaves field i in byte i (two's complement).
_SPREAD = {
    4: (torch.int16, 0x0101, 0xF00F - (1 << 16)),
    2: (torch.int32, 0x01010101, 0xC0300C03 - (1 << 32)),
    1: (torch.int64, 0x0101010101010101, 0x8040201008040201 - (1 << 64)),
}


def _spread(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """A byte for every field of contiguous uint8 ``[..., m]``, still at its bit: ``[..., m * 8 / bits]``."""
    if bits == 8:
        return rows
    dtype, repeat, mask = _SPREAD[bits]
    return rows.to(dtype).mul_(repeat).bitwise_and_(mask).view(torch.uint8)


@lru_cache(maxsize=256)
def _column_order(plane: Plane, device: torch.device) -> torch.Tensor:
    """Natural column of each number of a row, read off the same path on the index table."""
    if not plane.is_byte_separable:
        return torch.arange(plane.cols, device=device)
    table = _source(plane, device)
    columns = [_row_bytes(table[:, i].contiguous(), plane)[0] for i in range(table.shape[1])]
    return torch.stack(columns, dim=-1).flatten() % plane.cols


def pack_side(codes: torch.Tensor, params: tuple[torch.Tensor, ...], side: SideLayout) -> torch.Tensor:
    """Bytes of the keys' or values' side of pages.

    Args:
        codes: uint8 ``[..., page_tokens, head_dim]``; for a passthrough the elements themselves, in the compute dtype.
        params: fp16 scale and (unless symmetric) zero, each ``[..., groups, head_dim]`` for ``per_channel`` and
            ``[..., page_tokens, groups]`` for ``per_token``; empty for a passthrough.
        side: Layout.

    Returns:
        uint8 ``[..., side.nbytes]``, less what `pack_outliers` adds.
    """
    if side.fmt.is_passthrough:
        return codes.contiguous().flatten(-2).view(torch.uint8)
    matrix = codes if side.role == "key" else codes.transpose(-1, -2).contiguous()
    parts = [pack_plane(matrix, plane) for plane in side.planes]
    if side.fmt.grouping == "per_channel":
        parts += [p.contiguous().flatten(-2).view(torch.uint8) for p in params]
    else:
        pairs = torch.stack([p.transpose(-1, -2) for p in params], dim=-1).contiguous()
        parts.append(pairs.flatten(-3).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_params(pages: torch.Tensor, side: SideLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of a side of page records.

    Args:
        pages: uint8 ``[..., record bytes]``.
        side: Layout; not a passthrough.

    Returns:
        fp32 scale and zero, ``[..., groups, head_dim]`` (``per_channel``) or ``[..., page_tokens, groups]``
        (``per_token``): an element is ``scale * code + zero``, or ``scale * point + zero`` with a codebook; if
        symmetric, with ``zero = -scale * levels / 2``, or 0 with a codebook.
    """
    raw = pages[..., side.params_offset : side.outliers_offset].view(torch.float16).float()
    count = side.fmt.num_params
    if side.fmt.grouping == "per_channel":
        params = raw.unflatten(-1, (count, side.groups, side.head_dim)).unbind(-3)
    else:
        params = raw.unflatten(-1, (side.groups, side.page_tokens, count)).transpose(-2, -3).unbind(-1)
    return params[0], (params[1] if count == 2 else params[0] * side.fmt.symmetric_zero)


def unpack_side(pages: torch.Tensor, side: SideLayout) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Codes uint8 ``[..., page_tokens, head_dim]`` and (scale, zero) of a side; inverse of `pack_side`."""
    codes = _codes(pages, side)
    return (codes if side.role == "key" else codes.transpose(-1, -2)), unpack_params(pages, side)


def _codes(pages: torch.Tensor, side: SideLayout) -> torch.Tensor:
    """Codes by matrix row, uint8 ``[..., rows, cols]``."""
    codes = torch.zeros((*pages.shape[:-1], side.rows, side.cols), dtype=torch.uint8, device=pages.device)
    for plane in side.planes:
        data = pages[..., plane.offset : plane.offset + plane.nbytes]
        codes |= _natural(data, plane) << plane.shift
    return codes


def unpack_raw(pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """Elements ``[..., page_tokens, head_dim]`` of a passthrough side, in the compute dtype they were stored in."""
    raw = pages[..., side.offset : side.offset + side.nbytes].contiguous().view(dtype)
    return raw.view(*pages.shape[:-1], side.page_tokens, side.head_dim)

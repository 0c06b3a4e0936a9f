"""Codes and parameters to page bytes and back, in torch.

`pack_side` and `unpack_side` move whole sides; `plane_matrix` is what attention reads: one plane as floats, in an order
that costs only a byte permutation, together with the order of its columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import embedding

from kvloom.pages._fragment import LANES, Plane, source_index
from kvloom.pages._layout import SideLayout

_WIDE = {8: torch.int64, 4: torch.int32, 2: torch.int16}


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


def plane_matrix(data: torch.Tensor, plane: Plane, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One plane as numbers, rows in natural order and columns in whatever order is cheapest.

    Args:
        data: uint8 ``[n, plane.nbytes]``.
        plane: Geometry.
        dtype: dtype of the result.

    Returns:
        ``[n, rows, cols]`` of ``dtype`` and the int64 ``[cols]`` natural index of each stored column.
    """
    if not plane.is_byte_separable:
        return _natural(data, plane, dtype), torch.arange(plane.cols, device=data.device)
    rows, columns = _row_bytes(data, plane), _column_order(plane, data.device)
    if plane.bits == 1:  # eight shifts cost more than one look-up
        return embedding(rows.int(), _bit_table(dtype, data.device)).flatten(2), columns.T.flatten()
    return _fields(rows, plane, dtype, -2).flatten(2), columns.flatten()


def _natural(data: torch.Tensor, plane: Plane, dtype: torch.dtype) -> torch.Tensor:
    """Plane values ``[n, rows, cols]`` in natural order; inverse of `pack_plane` for ``shift`` 0."""
    fields = _fields(data, plane, dtype, -1).flatten(1)
    natural = fields.gather(1, _inverse(plane, data.device).expand(fields.shape[0], -1))  # 3 x faster than indexing
    return natural.view(-1, plane.rows, plane.cols)


def _row_bytes(data: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Bytes of a byte-separable plane gathered by row: ``[n, rows, cols * bits / 8]``; elements of any dtype."""
    per_half = plane.cols * plane.bits // 64  # bytes of one row in one half of a lane's words
    chunks, tiles, width = plane.tiles // plane.tiles_per_chunk, plane.tiles_per_chunk, per_half * 8
    if per_half % 2 == 0:
        run = per_half * 2
        wide = next(w for w in (8, 4, 2, 1) if run % w == 0) if data.dtype == torch.uint8 else 1
        lanes = data.view(_WIDE[wide] if wide > 1 else data.dtype)
        lanes = lanes.view(-1, chunks, 8, 4, tiles, 2, run // wide).permute(0, 1, 4, 5, 2, 3, 6)
        return lanes.contiguous().view(data.dtype).view(-1, plane.rows, width)
    halves = data.view(-1, chunks, LANES, tiles * per_half, 2, 2).transpose(-2, -3)
    lanes = halves.reshape(-1, chunks, 8, 4, 2, tiles, 2, per_half)
    return lanes.permute(0, 1, 5, 6, 2, 3, 4, 7).reshape(-1, plane.rows, width)


@lru_cache(maxsize=256)
def _column_order(plane: Plane, device: torch.device) -> torch.Tensor:
    """Natural column of each field of a row's bytes, ``[fields, bytes]``: read off the same path on the index table."""
    table = _source(plane, device)
    columns = torch.stack([_row_bytes(table[:, i].contiguous()[None], plane)[0, 0] for i in range(table.shape[1])])
    return columns % plane.cols


@lru_cache(maxsize=8)
def _bit_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[256, 8]``: the bits of every byte, lowest first."""
    byte = torch.arange(256, device=device)
    return torch.stack([(byte >> i) & 1 for i in range(8)], dim=-1).to(dtype)


def _fields(data: torch.Tensor, plane: Plane, dtype: torch.dtype, axis: int) -> torch.Tensor:
    """Split bytes ``[..., m]`` into fields on a new ``axis``: -1 ``[..., m, fields]``, -2 ``[..., fields, m]``."""
    count, mask = plane.fields_per_byte, 2**plane.bits - 1
    shape = (*data.shape, count) if axis == -1 else (*data.shape[:-1], count, data.shape[-1])
    out = torch.empty(shape, dtype=dtype, device=data.device)
    for i in range(count):
        field = data >> (plane.bits * i) if i else data
        out.select(axis, i).copy_(field if i == count - 1 else field & mask)
    return out


def pack_side(codes: torch.Tensor, params: tuple[torch.Tensor, ...], side: SideLayout) -> torch.Tensor:
    """Bytes of the keys' or values' side of pages.

    Args:
        codes: uint8 ``[..., page_tokens, head_dim]``; for a passthrough the elements themselves, in the compute dtype.
        params: fp16 scale and (unless symmetric) zero, each ``[..., groups, head_dim]`` for ``per_channel`` and
            ``[..., page_tokens, groups]`` for ``per_token``; empty for a passthrough.
        side: Layout.

    Returns:
        uint8 ``[..., side.nbytes]``.
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
        (``per_token``): an element is ``scale * code + zero``, with ``zero = -scale * levels / 2`` if symmetric.
    """
    end = side.offset + side.nbytes
    raw = pages[..., side.params_offset : end].contiguous().view(torch.float16).float()
    lead, count = pages.shape[:-1], side.fmt.num_params
    if side.fmt.grouping == "per_channel":
        params = raw.view(*lead, count, side.groups, side.head_dim).unbind(-3)
    else:
        params = raw.view(*lead, side.groups, side.page_tokens, count).transpose(-2, -3).unbind(-1)
    return params[0], (params[1] if count == 2 else params[0] * (-0.5 * side.fmt.levels))


def unpack_side(pages: torch.Tensor, side: SideLayout) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Codes uint8 ``[..., page_tokens, head_dim]`` and (scale, zero) of a side; inverse of `pack_side`."""
    lead = pages.shape[:-1]
    rows, cols = (side.page_tokens, side.head_dim) if side.role == "key" else (side.head_dim, side.page_tokens)
    codes = torch.zeros((*lead, rows, cols), dtype=torch.uint8, device=pages.device)
    for plane in side.planes:
        data = pages[..., plane.offset : plane.offset + plane.nbytes].reshape(-1, plane.nbytes)
        codes |= (_natural(data, plane, torch.uint8) << plane.shift).view(codes.shape)
    return (codes if side.role == "key" else codes.transpose(-1, -2)), unpack_params(pages, side)


def unpack_raw(pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """Elements ``[..., page_tokens, head_dim]`` of a passthrough side, in the compute dtype they were stored in."""
    raw = pages[..., side.offset : side.offset + side.nbytes].contiguous().view(dtype)
    return raw.view(*pages.shape[:-1], side.page_tokens, side.head_dim)

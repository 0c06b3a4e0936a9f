"""Products with packed matrices that never touch a scale inside the loop.

A side of a page is a matrix ``[rows, cols]`` contracted over its columns: keys ``[tokens, channels]`` with Q, values
``[channels, tokens]`` with P. Parameters that vary along the columns fold into the moving operand, ``x.(s*c + z) =
(x*s).c + x.z``; parameters that vary along the rows fold into the result (``page-format.md``, "What makes it work", 1).
"""

from __future__ import annotations

import torch

from kvloom.pages import Plane, SideLayout, plane_matrix, unpack_params, unpack_raw

# Pages are unpacked this many elements at a time: 4 MB of floats, about a core's L2 and half its L3 share.
BLOCK_ELEMENTS = 1 << 20


def packed_product(x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """``x @ M^T`` for every page, M being the side's matrix ``[rows, cols]``.

    Args:
        x: ``[lead, n or 1, m, cols]``, lead = batch x heads, in the dtype to compute in.
        pages: uint8 ``[lead, n, record bytes]``.
        side: Layout.
        dtype: Compute dtype (passthrough elements).

    Returns:
        ``[lead, n, m, rows]`` in x's dtype.
    """
    lead, n = pages.shape[:2]
    step = max(1, BLOCK_ELEMENTS // (lead * side.page_tokens * side.head_dim))
    blocks = [
        _block_product(x if x.shape[1] == 1 else x[:, i : i + step], pages[:, i : i + step], side, dtype)
        for i in range(0, n, step)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _block_product(x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    if side.fmt.is_passthrough:
        dense = unpack_raw(pages, side, dtype).to(x.dtype)  # [lead, n, tokens, channels]
        return x @ (dense.transpose(-1, -2) if side.role == "key" else dense)
    scale, zero = (p.to(x.dtype) for p in unpack_params(pages, side))
    if (side.role == "key") == (side.fmt.grouping == "per_channel"):
        if side.role == "value":
            scale, zero = scale.transpose(-1, -2), zero.transpose(-1, -2)
        return _fold_into_x(x, pages, side, scale, zero)
    if side.role == "value":
        scale, zero = scale.transpose(-1, -2), zero.transpose(-1, -2)
    return _fold_into_result(x, pages, side, scale, zero)


def _fold_into_x(
    x: torch.Tensor, pages: torch.Tensor, side: SideLayout, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Parameters ``[lead, n, row groups, cols]``: one scaled copy of x per group of rows."""
    lead, n, groups, cols = scale.shape
    m = x.shape[-2]
    moving = (x.unsqueeze(2) * scale.unsqueeze(3)).reshape(lead * n * groups, m, cols)
    out = _planes_product(moving, pages, side, groups)  # [lead * n * groups, m, rows / groups]
    out += (x.unsqueeze(2) * zero.unsqueeze(3)).sum(-1).reshape(lead * n * groups, m, 1)
    return out.reshape(lead, n, groups, m, -1).transpose(2, 3).reshape(lead, n, m, -1)


def _fold_into_result(
    x: torch.Tensor, pages: torch.Tensor, side: SideLayout, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """Parameters ``[lead, n, rows, col groups]``: a block-diagonal x gives one partial result per group of columns."""
    lead, n, rows, groups = scale.shape
    m, cols = x.shape[-2:]
    parts = x.expand(lead, n, m, cols).unflatten(-1, (groups, -1))  # [lead, n, m, groups, cols / groups]
    eye = torch.eye(groups, dtype=x.dtype, device=x.device).view(groups, 1, groups, 1)
    moving = (parts.unsqueeze(2) * eye).reshape(lead * n, groups * m, cols)
    out = _planes_product(moving, pages, side, 1).view(lead, n, groups, m, rows)
    scaled = (out * scale.transpose(-1, -2).unsqueeze(3)).sum(2)
    return scaled.add_(parts.sum(-1) @ zero.transpose(-1, -2))


def _planes_product(moving: torch.Tensor, pages: torch.Tensor, side: SideLayout, groups: int) -> torch.Tensor:
    """``moving @ codes^T``, plane by plane: ``[pages * groups, m, cols] -> [pages * groups, m, rows / groups]``."""
    total: torch.Tensor | None = None
    for plane in side.planes:
        matrix, columns = plane_matrix(_plane_bytes(pages, plane), plane, moving.dtype)
        matrix = matrix.view(-1, plane.rows // groups, plane.cols)
        part = moving.gather(-1, columns.expand(moving.shape)) @ matrix.transpose(-1, -2)
        total = part if total is None else total.add_(part, alpha=1 << plane.shift)
    if total is None:
        raise AssertionError("a packed side has at least one plane")
    return total


def _plane_bytes(pages: torch.Tensor, plane: Plane) -> torch.Tensor:
    return pages[..., plane.offset : plane.offset + plane.nbytes].reshape(-1, plane.nbytes)

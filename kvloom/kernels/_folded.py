"""Products with packed matrices that never touch a scale inside the loop.

A side of a page is a matrix ``[rows, cols]`` contracted over its columns: keys ``[tokens, channels]`` with Q, values
``[channels, tokens]`` with P. Parameters that vary along the columns fold into the moving operand, ``x.(s*c + z) =
(x*s).c + x.z``; parameters that vary along the rows fold into the result (``page-format.md``, "What makes it work", 1).
"""

from __future__ import annotations

import torch

from kvloom.pages import SideLayout, side_matrix, unpack_params, unpack_raw

# Pages are unpacked this many elements at a time: on a CPU 4 MB of floats, about a core's L2 and half its L3 share;
# elsewhere enough to fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_MANY_ELEMENTS = 1 << 26


def packed_scores(x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """``x @ K^T`` for the keys of every page.

    Args:
        x: Queries ``[lead, m, channels]``, lead = batch x heads, in the dtype to compute in.
        pages: uint8 ``[lead, n, record bytes]``.
        side: Layout of the keys.
        dtype: Compute dtype (passthrough elements).

    Returns:
        ``[lead, m, n * page_tokens]`` in x's dtype.
    """
    if side.fmt.is_passthrough:
        return x @ unpack_raw(pages, side, dtype).to(x.dtype).flatten(1, 2).transpose(-1, -2)
    scale, zero = (p.to(x.dtype) for p in unpack_params(pages, side))
    if side.fmt.grouping == "per_channel":  # parameters [lead, n, token groups, channels]
        out = _codes_product(x[:, None, None] * scale.unsqueeze(3), pages, side)  # [lead, n, groups, m, tokens]
        out += (zero.flatten(1, 2) @ x.transpose(-1, -2)).view(*out.shape[:-1], 1)
        return out.permute(0, 3, 1, 2, 4).flatten(2)
    n, groups = scale.shape[1], side.groups  # parameters [lead, n, tokens, channel groups]
    moving = _block_diagonal(x, groups).flatten(1, 2)[:, None, None]
    partial = _codes_product(moving.expand(-1, n, -1, -1, -1), pages, side).view(len(x), n, groups, x.shape[1], -1)
    sums = x.unflatten(-1, (groups, -1)).sum(-1).unsqueeze(1)  # [lead, 1, m, groups]
    out = (partial * scale.transpose(-1, -2).unsqueeze(3)).sum(2).add_(sums @ zero.transpose(-1, -2))
    return out.transpose(1, 2).flatten(2)


def packed_values(x: torch.Tensor, pages: torch.Tensor, side: SideLayout, dtype: torch.dtype) -> torch.Tensor:
    """``x @ V`` over the values of all pages.

    Args:
        x: Weights ``[lead, m, n * page_tokens]``, in the dtype to compute in.
        pages: uint8 ``[lead, n, record bytes]``.
        side: Layout of the values.
        dtype: Compute dtype (passthrough elements).

    Returns:
        ``[lead, m, channels]`` in x's dtype.
    """
    if side.fmt.is_passthrough:
        return x @ unpack_raw(pages, side, dtype).to(x.dtype).flatten(1, 2)
    lead, m = x.shape[:2]
    scale, zero = (p.to(x.dtype) for p in unpack_params(pages, side))
    by_page = x.unflatten(-1, (scale.shape[1], -1)).transpose(1, 2)  # [lead, n, m, tokens]
    if side.fmt.grouping == "per_token":  # parameters [lead, n, tokens, channel groups]
        moving = by_page.unsqueeze(2) * scale.transpose(-1, -2).unsqueeze(3)
        out = _codes_product(moving, pages, side).sum(1)  # [lead, groups, m, channels of a group]
        out += (x @ zero.flatten(1, 2)).transpose(-1, -2).unsqueeze(-1)
        return out.transpose(1, 2).flatten(2)
    moving = _block_diagonal(by_page.flatten(0, 1), side.groups).reshape(lead, -1, 1, side.groups * m, side.page_tokens)
    # Parameters [lead, n, token groups, channels].
    partial = _codes_product(moving, pages, side).view(*scale.shape[:3], m, -1)
    sums = x.unflatten(-1, (scale.shape[1] * side.groups, -1)).sum(-1)  # [lead, m, n * groups]
    return (partial * scale.unsqueeze(3)).sum((1, 2)).add_(sums @ zero.flatten(1, 2))


def _codes_product(moving: torch.Tensor, pages: torch.Tensor, side: SideLayout) -> torch.Tensor:
    """Products with the codes, each group of rows with its own moving rows.

    Args:
        moving: ``[lead, n, row groups, m, cols]``.
        pages: uint8 ``[lead, n, record bytes]``.
        side: Layout.

    Returns:
        ``[lead, n, row groups, m, rows / groups]`` in ``moving``'s dtype.
    """
    lead, n = pages.shape[:2]
    most = _BLOCK_ELEMENTS.get(pages.device.type, _MANY_ELEMENTS)
    step = max(1, most // (lead * side.page_tokens * side.head_dim))
    blocks = [_block_product(moving[:, i : i + step], pages[:, i : i + step], side) for i in range(0, n, step)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _block_product(moving: torch.Tensor, pages: torch.Tensor, side: SideLayout) -> torch.Tensor:
    codes, columns, weights = side_matrix(pages, side, moving.dtype)
    lead, n, groups, m, cols = moving.shape
    stored = moving.reshape(-1, cols).index_select(1, columns).mul_(weights).view(-1, m, len(columns))
    out = stored @ codes.view(len(stored), -1, len(columns)).transpose(-1, -2)
    return out.view(lead, n, groups, m, -1)


def _block_diagonal(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[lead, m, cols]`` to ``[lead, groups, m, cols]``, zero but for the columns of each group."""
    eye = torch.eye(groups, dtype=x.dtype, device=x.device).repeat_interleave(x.shape[-1] // groups, dim=1)
    return x.unsqueeze(1) * eye.unsqueeze(1)

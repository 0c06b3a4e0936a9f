"""Caches to measure on: random codes with tame parameters for time, packed random values for errors."""

from __future__ import annotations

import torch

from kvloom.bench._grid import Grid, Pair, Shape
from kvloom.kernels import Backend
from kvloom.pages import ExactKV, HeadPages, PagedKV, PageLayout, SideLayout, StaticKV

OUTLIER_CHANNEL = 5
OUTLIER = 8.0


def random_query(grid: Grid, shape: Shape, device: torch.device) -> torch.Tensor:
    """``[batch, query_heads, 1, head_dim]`` with a standard deviation of 2, so that the softmax is not flat."""
    return 2 * torch.randn(shape.batch, grid.query_heads, 1, grid.head_dim, dtype=grid.dtype, device=device)


def random_dense(grid: Grid, shape: Shape, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal keys, with an outlier channel, and values: ``[batch, kv_heads, tokens, head_dim]`` each."""
    size = (shape.batch, grid.kv_heads, tokens, grid.head_dim)
    key, value = (torch.randn(size, dtype=grid.dtype, device=device) for _ in range(2))
    key[..., OUTLIER_CHANNEL] += OUTLIER
    return key, value


def random_cache(grid: Grid, shape: Shape, pair: Pair, device: torch.device) -> PagedKV:
    """A cache of random codes, scales and zero points of about 0.01, and a normal window."""
    layout = grid.layout(pair)
    size = (shape.batch, grid.kv_heads, shape.tokens // layout.page_tokens, layout.nbytes)
    data = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    for side in (layout.key, layout.value):
        span = slice(side.params_offset, side.offset + side.nbytes)
        data[..., span] = _parameters((*size[:-1], span.stop - span.start), side, grid.dtype, device)
    return _paged(layout, data, ExactKV(*random_dense(grid, shape, grid.window, device)))


def packed_cache(backend: Backend, grid: Grid, shape: Shape, pair: Pair, device: torch.device) -> PagedKV:
    """A cache of normal values with an outlier channel of the keys, packed by ``backend``, sequence by sequence."""
    layout = grid.layout(pair)
    one = Shape(1, shape.tokens)
    rows = [backend.encode(*random_dense(grid, one, shape.tokens, device), layout) for _ in range(shape.batch)]
    return _paged(layout, torch.cat(rows), ExactKV(*random_dense(grid, shape, grid.window, device)))


def static_cache(grid: Grid, shape: Shape, pair: Pair, device: torch.device) -> StaticKV:
    """An empty cache with room for whole pages of tokens and no window."""
    layout = grid.layout(pair)
    lead = (shape.batch, grid.kv_heads)
    data = torch.zeros(*lead, shape.tokens // layout.page_tokens, layout.nbytes, dtype=torch.uint8, device=device)
    exact = torch.zeros(2, *lead, layout.page_tokens, grid.head_dim, dtype=grid.dtype, device=device)
    state, flags = (torch.zeros(n, dtype=torch.int32, device=device) for n in (2 * shape.batch + 1, 2))
    filled = torch.arange(shape.tokens + 1, dtype=torch.int32, device=device) // layout.page_tokens
    pages = (HeadPages(tuple(range(grid.kv_heads)), layout, data),)
    none = ExactKV(exact[0][:, :, :0], exact[1][:, :, :0])
    return StaticKV(pages, none, ExactKV(exact[0], exact[1]), state, flags, filled, layout.page_tokens)


def _parameters(size: tuple[int, ...], side: SideLayout, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Bytes ``[..., n]`` of parameters, or of the elements of a passthrough side."""
    if side.fmt.is_passthrough:
        elements = torch.randn(*size[:-1], size[-1] // dtype.itemsize, dtype=dtype, device=device)
    else:
        numbers = torch.rand(*size[:-1], size[-1] // torch.float16.itemsize, device=device)
        elements = (0.005 + 0.01 * numbers).half()
    return elements.view(torch.uint8)


def _paged(layout: PageLayout, data: torch.Tensor, tail: ExactKV) -> PagedKV:
    """One query's view of packed pages ``data [batch, kv_heads, pages, layout.nbytes]`` and a window."""
    pages = data.shape[2]
    none = tail.key[:, :, :0]
    return PagedKV(
        pages=(HeadPages(tuple(range(data.shape[1])), layout, data),),
        sinks=ExactKV(none, none),
        tail=tail,
        length=pages * layout.page_tokens + tail.tokens,
        page_tokens=layout.page_tokens,
        num_pages=pages,
        visible=torch.full((1,), pages, dtype=torch.int64, device=data.device),
    )

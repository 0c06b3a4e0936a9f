"""Bytes and operations that a measurement cannot do without, by layout arithmetic."""

from __future__ import annotations

from kvloom.bench._grid import Grid, Pair, Shape


def attend_bytes(grid: Grid, shape: Shape, pair: Pair) -> int:
    """Bytes of one decode step over pages: page records and exact tokens read, query read, output written."""
    layout = grid.layout(pair)
    heads = shape.batch * grid.kv_heads
    exact = 2 * heads * grid.window * grid.head_dim * grid.itemsize
    return heads * (shape.tokens // layout.page_tokens) * layout.nbytes + exact + _query_and_output(grid, shape)


def dense_bytes(grid: Grid, shape: Shape) -> int:
    """Bytes of one decode step over a dense cache of the packed tokens alone: the window is ours to pay for."""
    elements = 2 * shape.batch * grid.kv_heads * shape.tokens * grid.head_dim
    return elements * grid.itemsize + _query_and_output(grid, shape)


def encode_bytes(grid: Grid, shape: Shape, pair: Pair) -> int:
    """Bytes of packing: keys and values read, page records written."""
    layout = grid.layout(pair)
    heads = shape.batch * grid.kv_heads
    elements = 2 * heads * shape.tokens * grid.head_dim
    return elements * grid.itemsize + heads * (shape.tokens // layout.page_tokens) * layout.nbytes


def attend_flops(grid: Grid, shape: Shape, tokens: int) -> int:
    """Floating-point operations of one decode step over ``tokens`` tokens: a multiply and an add for K and for V."""
    return 4 * shape.batch * grid.query_heads * tokens * grid.head_dim


def _query_and_output(grid: Grid, shape: Shape) -> int:
    return 2 * shape.batch * grid.query_heads * grid.head_dim * grid.itemsize

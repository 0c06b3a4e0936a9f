"""Kernels that a server will need, built before a request waits for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from kvloom.kernels import _cuda_pages
from kvloom.kernels._base import Reach
from kvloom.kernels._cuda_launch import (
    BLOCK_WARPS,
    MAX_CLUSTER,
    NO_TURNS,
    ROWS,
    SOURCE,
    Kernel,
    Turns,
    exact_units,
    spread,
)
from kvloom.kernels._nvrtc import Build
from kvloom.pages import PageLayout


@dataclass(frozen=True)
class Device:
    """What launches depend on.

    Attributes:
        processors: Multiprocessors.
        shared_limit: Bytes of shared memory that a block may have.
        has_clusters: Whether blocks can be clusters.
    """

    processors: int
    shared_limit: int
    has_clusters: bool


def pooled_builds(
    heads: int, layout: PageLayout, dtype: torch.dtype, reach: Reach, device: Device, turns: Turns
) -> set[Build]:
    """What packs, unpacks and attends to pages of a layout in `kvloom.pages.PooledKV`, and in prompts before it.

    Args:
        heads: KV heads that have the layout.
        layout: Of the pages.
        dtype: Compute dtype, fp16 or bf16.
        reach: How far the cache goes.
        device: Where it is.
        turns: What kernels turn of a token that is decoded.
    """
    found = {
        ("encode.cu", _cuda_pages.encode_defines(layout, dtype, append=False)),
        ("encode.cu", _cuda_pages.encode_defines(layout, dtype, append=True, pooled=True)),
        ("decode.cu", _cuda_pages.decode_defines(layout, dtype, tabled=True)),
    }
    if "hadamard" in (layout.key.fmt.rotation, layout.value.fmt.rotation):
        found.add(("rotate.cu", _cuda_pages.rotate_defines(dtype, layout.head_dim)))
    return found | set(_attention(heads, layout, dtype, reach, device, turns))


def _attention(
    heads: int, layout: PageLayout, dtype: torch.dtype, reach: Reach, device: Device, turns: Turns
) -> Iterator[Build]:
    most = layout.page_tokens
    steps = ((count * _row_tiles(reach.group), True) for count in range(1, reach.sequences + 1))
    chunks = ((_row_tiles(rows), False) for rows in range(2 * reach.group, most + 1, reach.group))
    for row_tiles, is_pooled in set(chain(steps, chunks)):
        for tail in (most,) if is_pooled else (1, 2 * most):
            spread_at = partial(_spread, layout, heads * row_tiles, exact_units(reach.sinks, tail), device)
            for warps, splits in map(spread_at, _page_counts(spread_at, reach.pages)):
                kernel = Kernel(
                    layout,
                    warps,
                    dtype == torch.bfloat16,
                    0 if is_pooled else 1,
                    is_capped=reach.is_capped,
                    is_pooled=is_pooled,
                    turns=turns.of(layout) if is_pooled else NO_TURNS,
                )
                for clustered in _merges(splits, device):
                    yield SOURCE, kernel.defines(clustered=clustered)


def _spread(layout: PageLayout, tiles: int, exact: int, device: Device, pages: int) -> tuple[int, int]:
    return spread(layout, tiles, pages, exact, device.processors, device.shared_limit)


def _page_counts(spread_at: Callable[[int], tuple[int, int]], most: int) -> set[int]:
    """The ends of every range of page counts in which blocks have one number of warps.

    Warps do not become fewer with pages, and at one number of warps splits grow one by one: whatever way to merge them
    occurs within a range occurs at one of its ends.
    """
    counts = range(most + 1)
    starts = {bisect_left(counts, warps, key=lambda pages: spread_at(pages)[0]) for warps in BLOCK_WARPS}
    return {0, most} | {pages for start in starts for pages in (start - 1, start) if pages in counts}


def _row_tiles(rows: int) -> int:
    return -(-rows // ROWS)


def _merges(splits: int, device: Device) -> set[bool]:
    """Whether splits may be merged in a cluster; both where the device is to be asked."""
    if not device.has_clusters or splits > MAX_CLUSTER:
        return {False}
    return {True} if splits == 1 else {True, False}

"""What a block table costs a decode step: one layer's attention over pages in order, and over blocks in any order.

    python -m benchmarks.page_table                                                          # one GPU: 64 x 4K, fp16
    python -m benchmarks.page_table --device cpu --shapes B2x128 --heads 4/2 --head-dim 64   # does it run?

Random codes, half a page of exact tokens a sequence. `contiguous`: every sequence has its pages in a row. `in order`
and `shuffled`: blocks of all heads' pages, as in vLLM, found through a table. `plugin`: what a layer of the vLLM plugin
does with the shuffled blocks, the token appended included. Bound: a shuffled table costs the kernel at most 5 %.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.figures import Verdict
from kvloom import kernels
from kvloom.bench._caches import random_cache, random_query
from kvloom.bench._grid import Grid, Pair, Shape, make_grid
from kvloom.bench._timing import clock
from kvloom.integrations.vllm._blocks import Blocks
from kvloom.integrations.vllm._decoding import Decoding
from kvloom.integrations.vllm._layout import BlockLayout
from kvloom.pages import PagedKV

Way = Callable[[], torch.Tensor]

MOST_LONGER = 0.05


def ways(grid: Grid, shape: Shape, pair: Pair, device: torch.device) -> dict[str, Way]:
    """Attention of one token of every sequence, by name."""
    kv, query = random_cache(grid, shape, pair, device), random_query(grid, shape, device)
    page = grid.layout(pair)
    layout = BlockLayout((page,) * grid.kv_heads, 0, grid.itemsize, page.nbytes * grid.kv_heads)
    width = kv.num_pages + layout.spare_blocks
    in_order = 1 + torch.arange(shape.batch * width, dtype=torch.int32, device=device).view(shape.batch, -1)
    shuffled = 1 + torch.randperm(shape.batch * width, device=device).int().view(shape.batch, -1)
    backend = kernels.backend(device)
    found: dict[str, Way] = {"contiguous": partial(backend.attend, query, kv, scaling=grid.scaling)}
    for name, table in (("in order", in_order), ("shuffled", shuffled)):
        blocks = _blocks(kv, layout, table)
        through = replace(kv, pages=blocks.pages, table=table[:, : kv.num_pages])
        found[name] = partial(backend.attend, query, through, scaling=grid.scaling)
    decoding = _decoding(kv, shuffled, kv.length)
    return {**found, "plugin": partial(_layer, query, kv, blocks, decoding, grid.scaling)}


def _blocks(kv: PagedKV, layout: BlockLayout, table: torch.Tensor) -> Blocks:
    """The pages and exact tokens of a cache, the newest excepted, in blocks."""
    storage = torch.zeros(1 + table.numel(), layout.nbytes, dtype=torch.uint8, device=kv.device)
    storage[table[:, : kv.num_pages].flatten()] = kv.pages[0].data.transpose(1, 2).flatten(0, 1).flatten(1)
    blocks = Blocks(layout, storage, kv.dtype, torch.zeros(2, dtype=torch.int32, device=kv.device))
    for token in range(kv.tail.tokens):
        length = kv.num_pages * kv.page_tokens + token
        _decoding(kv, table, length + 1).append(
            blocks, *(x[:, :, token : token + 1] for x in (kv.tail.key, kv.tail.value))
        )
    return blocks


def _decoding(kv: PagedKV, table: torch.Tensor, length: int) -> Decoding:
    lengths = torch.full((len(table),), length, dtype=torch.int32, device=table.device)
    return Decoding(
        slice(0, len(table)),
        lengths,
        table,
        most=length,
        capacity=kv.length,
        kv_heads=kv.shape[1],
        sinks=0,
        page_tokens=kv.page_tokens,
    )


def _layer(query: torch.Tensor, kv: PagedKV, blocks: Blocks, decoding: Decoding, scaling: float) -> torch.Tensor:
    now = decoding.append(blocks, kv.tail.key[:, :, -1:], kv.tail.value[:, :, -1:])
    return kernels.backend(kv.device).attend_pooled(query, now, scaling=scaling)


def run(grid: Grid, shape: Shape, pair: Pair, device: torch.device) -> dict[str, float]:
    """Seconds of each of `ways`."""
    return {name: clock(device).time([way]).seconds for name, way in ways(grid, shape, pair, device).items()}


def verdict(seconds: dict[str, float]) -> Verdict:
    """The bound."""
    longer = seconds["shuffled"] / seconds["contiguous"] - 1
    return Verdict(longer <= MOST_LONGER, f"a shuffled table costs {longer:+.1%}, at most +5 %")


def main() -> None:
    """Measure, and print times and verdicts."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="B64x4K")
    parser.add_argument("--pairs", default="4:4,4:2,2:2")
    parser.add_argument("--heads", default="32/8")
    parser.add_argument("--head-dim", type=int, default=128)
    asked = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(asked.device)
    grid = make_grid(device, shapes=asked.shapes, pairs=asked.pairs, heads=asked.heads, head_dim=asked.head_dim)
    for shape in grid.shapes:
        for pair in grid.pairs:
            seconds = run(grid, shape, pair, device)
            print(shape.label, pair.label, *(f"{name} {x * 1e6:.1f} us" for name, x in seconds.items()), sep="  ")
            print(verdict(seconds))


if __name__ == "__main__":
    main()

"""One layer's attention by the warps of a block, over row tiles and pages: is `block_warps` right on this GPU?

    python -m benchmarks.block_warps                                # a minute on one GPU
    python -m benchmarks.block_warps --plans kvloom/K3V3 --tiles 512,1024

Sequences of 8 KV heads with 4 query heads each, bf16, half a page of exact tokens, random codes; a row tile is a KV
head of a sequence. Every row prints microseconds by warps, and a star at what is shipped. Bound: shipped is at most
10 % slower than the best.
"""

from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from unittest.mock import patch

import torch

from benchmarks.figures import Verdict
from kvloom import kernels
from kvloom.assets import shape_config
from kvloom.bench._timing import clock
from kvloom.kernels import _cuda_launch, _nvrtc
from kvloom.pages import ExactKV, HeadPages, PageLayout, StaticKV, state_numbers
from kvloom.plan import head_layouts, preset

SHAPE, HEADS, GROUP, SINKS = "llama-3.1-8b", 8, 4, 4
WARPS = (12, 8, 4, 2, 1)
MOST_SLOWER = 0.10
MOST_BYTES, COLD_BYTES = 3.2e9, 2.2e8


def store(layout: PageLayout, tiles: int, pages: int, device: torch.device) -> StaticKV:
    """A layer's cache of ``tiles / HEADS`` sequences; its codes mean nothing."""
    batch, size, dim = tiles // HEADS, layout.page_tokens, layout.head_dim
    data = torch.randint(0, 60, (batch, HEADS, pages, layout.nbytes), dtype=torch.uint8, device=device)
    exact = partial(torch.randn, dtype=torch.bfloat16, device=device)
    sinks, tail = (ExactKV(exact(batch, HEADS, n, dim), exact(batch, HEADS, n, dim)) for n in (SINKS, size))
    tokens = SINKS + pages * size + size // 2
    state = torch.zeros(state_numbers(batch, HEADS), dtype=torch.int32, device=device)
    state[: 2 * batch] = torch.tensor([tokens, pages], dtype=torch.int32, device=device).repeat(batch)
    filled = (torch.arange(tokens + 2, dtype=torch.int32, device=device) - SINKS).clamp_min(0) // size
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    return StaticKV((HeadPages(tuple(range(HEADS)), layout, data),), sinks, tail, state, flags, filled, size)


def seconds(stores: list[StaticKV], query: torch.Tensor) -> dict[int, float]:
    """Of one layer, by warps whose pages fit the device."""
    found, layout, limit = {}, stores[0].pages[0].layout, _nvrtc.shared_limit(query.device.index)
    for warps in (n for n in WARPS if _cuda_launch.shared_bytes(layout, n) <= limit):
        with patch.object(_cuda_launch, "block_warps", lambda *_, warps=warps: warps):
            launches = [partial(kernels.attend_static, query, kv, scaling=query.shape[-1] ** -0.5) for kv in stores]
            found[warps] = clock(query.device).time(launches).seconds
    return found


def shipped(layout: PageLayout, tiles: int, pages: int, device: int) -> int:
    """Warps that `block_warps` chooses."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _cuda_launch.block_warps(
        layout, -(-tiles // processors), tiles * pages // processors, _nvrtc.shared_limit(device)
    )


def main() -> None:
    """Measure, and print times and a verdict."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plans", default="kvloom/K2V2,kvloom/K4V4")
    parser.add_argument("--tiles", default="128,256,512,1024,2048,8192")
    parser.add_argument("--pages", default="4,9,19,64,128,512")
    asked = parser.parse_args()
    device, config = torch.device("cuda", torch.cuda.current_device()), shape_config(SHAPE)
    print(torch.cuda.get_device_name(device))
    worst = 0.0
    for name in asked.plans.split(","):
        layout = head_layouts(preset(name, config).spec(0), HEADS, config.head_dim, torch.bfloat16.itemsize)[0]
        for tiles in map(int, asked.tiles.split(",")):
            query = torch.randn(tiles // HEADS, HEADS * GROUP, 1, layout.head_dim, dtype=torch.bfloat16, device=device)
            for pages in map(int, asked.pages.split(",")):
                nbytes = tiles * pages * layout.nbytes
                if nbytes > MOST_BYTES:
                    continue
                copies = 1 + int(COLD_BYTES // nbytes)
                found = seconds([store(layout, tiles, pages, device) for _ in range(copies)], query)
                own = shipped(layout, tiles, pages, device.index)
                worst = max(worst, found[own] / min(found.values()) - 1)
                words = (f"{n}{'*' if n == own else ''}: {x * 1e6:.1f}" for n, x in found.items())
                print(f"{name}, {tiles} tiles x {pages} pages, us by warps:", *words, sep="  ", flush=True)
    print(Verdict(worst <= MOST_SLOWER, f"what is shipped is at most {worst:.1%} slower than the best, allowed 10 %"))


if __name__ == "__main__":
    main()

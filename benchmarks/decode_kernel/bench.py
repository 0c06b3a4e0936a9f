"""A decode kernel on the page format: checked against float64, then timed beside FP16 attention.

    PYTHONPATH=. python benchmarks/decode_kernel/bench.py     # needs a Hopper GPU, torch and cupy

The kernel (`attend.cu`) is an experiment, not part of the package: it reads whole pages only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cupy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvloom.kernels import backend
from kvloom.pages import Format, PageLayout, page_layout

SOURCE = Path(__file__).with_name("attend.cu").read_text(encoding="utf-8")
PLANES = {1: (1, 0), 2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
SHARED_BYTES = 180 * 1024
COLD_BYTES = 200_000_000
PAIRS = ((8, 8), (4, 4), (4, 2), (3, 3), (2, 2), (1, 1))
SHAPES = ((8, 32768), (1, 131072), (1, 32768), (1, 4096))
CHECKS = (  # head_dim, key bits, value bits, key groups, value groups, heads per KV head, symmetric
    (128, 4, 4, 1, 1, 4, False),
    (128, 2, 2, 1, 1, 4, False),
    (128, 3, 3, 1, 1, 4, False),
    (128, 1, 1, 1, 1, 4, False),
    (128, 8, 8, 1, 1, 4, False),
    (128, 5, 6, 1, 1, 8, False),
    (128, 6, 5, 2, 4, 7, False),
    (64, 4, 2, 1, 1, 3, False),
    (64, 1, 1, 1, 1, 1, False),
    (256, 2, 2, 2, 2, 2, False),
    (96, 4, 2, 1, 1, 4, False),
    (128, 4, 4, 1, 1, 4, True),
    (128, 2, 3, 2, 2, 5, True),
)


@lru_cache(maxsize=64)
def compiled(layout: PageLayout, heads: int, stages: int, warps: int) -> tuple[Any, Any]:
    """The attention and the combine kernel for a layout."""
    key, value = layout.key.fmt, layout.value.fmt
    names = ("KB0", "KB1", "VB0", "VB1", "KGROUPS", "VGROUPS", "KSYM", "VSYM", "D", "HEADS", "STAGES", "NWARPS")
    numbers = (
        *PLANES[key.bits],
        *PLANES[value.bits],
        layout.key.groups,
        layout.value.groups,
        int(key.symmetric),
        int(value.symmetric),
        layout.head_dim,
        heads,
        stages,
        warps,
    )
    defines = [f"-D{name}={number}" for name, number in zip(names, numbers, strict=True)]
    module = cupy.RawModule(code=SOURCE, options=("-std=c++17", *defines), backend="nvrtc")
    attend = module.get_function("attend_pages")
    if stages:
        attend.max_dynamic_shared_size_bytes = SHARED_BYTES
    return attend, module.get_function("combine")


def attention(
    query: torch.Tensor, pages: torch.Tensor, layout: PageLayout, *, splits: int, stages: int = 2, warps: int = 4
) -> Callable[[], torch.Tensor]:
    """A launch: fp16 ``query [batch, heads, d]``, ``pages [batch, kv_heads, n, bytes]``; fp32 output, poisoned."""
    batch, query_heads, dim = query.shape
    kv_heads, heads = pages.shape[1], query_heads // pages.shape[1]
    attend, combine = compiled(layout, heads, stages, warps)
    parts, stats = (torch.full((batch, kv_heads, splits, heads, width), torch.nan, device="cuda") for width in (dim, 2))
    out, lse = torch.full(query.shape, torch.nan, device="cuda"), torch.full(query.shape[:2], torch.nan, device="cuda")
    scale = cupy.float32(dim**-0.5 * 1.4426950408889634)
    strides = cupy.int64(pages.stride(0)), cupy.int64(pages.stride(1)), cupy.int32(pages.shape[2])
    first = (query.data_ptr(), pages.data_ptr(), *strides, scale, parts.data_ptr(), stats.data_ptr())
    second = (parts.data_ptr(), stats.data_ptr(), cupy.int32(splits), out.data_ptr(), lse.data_ptr())

    def launch() -> torch.Tensor:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            shared = stages * warps * layout.nbytes
            attend((splits, kv_heads, batch), (32 * warps,), first, shared_mem=shared)
            combine((batch * query_heads,), (dim,), second)
        return out

    return launch


def check() -> None:
    """Relative error against float64 on the same codes, fresh inputs, an outlier channel."""
    reference = backend(torch.device("cuda"))
    for dim, key_bits, value_bits, key_groups, value_groups, heads, symmetric in CHECKS:
        key = Format(key_bits, "per_channel", 64 // key_groups, symmetric)
        layout = page_layout(key, Format(value_bits, "per_token", dim // value_groups, symmetric), dim)
        k, v = torch.randn(2, 2, 3, 64 * 13, dim, device="cuda").half()
        k[..., 5] += 8
        pages = reference.encode(k, v, layout)
        k, v = (x.double() for x in reference.decode(pages, layout, torch.float32))
        query = (2 * torch.randn(2, 3 * heads, dim, device="cuda")).half()
        stages = 2 if 8 * layout.nbytes <= SHARED_BYTES else 0
        out = attention(query, pages, layout, splits=3, stages=stages)().double()
        scores = query.double().view(2, 3, heads, dim) @ k.transpose(-1, -2) * dim**-0.5
        expected = (scores.softmax(-1) @ v).view_as(out)
        error = float((out - expected).norm() / expected.norm())
        print(f"d={dim} K{key_bits}V{value_bits} {key_groups}/{value_groups} groups {heads} heads: {error:.1e}")


def median_us(launches: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one launch, in a CUDA graph that walks all of them (cold inputs)."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return sorted(times)[repeats // 2]


def fp16_us(query: torch.Tensor, tokens: int, kv_heads: int) -> float:
    """The faster of flash and cuDNN attention."""
    shape = (query.shape[0], kv_heads, tokens, query.shape[-1])
    copies = 1 + COLD_BYTES // (4 * torch.Size(shape).numel())
    caches = [torch.randn(2, *shape, device="cuda", dtype=torch.float16) for _ in range(copies)]

    def run(kind: SDPBackend, kv: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(query[:, :, None], kv[0], kv[1], enable_gqa=True)

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return min(median_us([lambda kind=kind, kv=kv: run(kind, kv) for kv in caches]) for kind in kinds)


def random_pages(shape: tuple[int, int, int], layout: PageLayout) -> torch.Tensor:
    """Random codes with tame parameters."""
    pages = torch.randint(0, 256, (*shape, layout.nbytes), dtype=torch.uint8, device="cuda")
    tame = torch.tensor([0.01], dtype=torch.float16, device="cuda").view(torch.uint8)
    for side in (layout.key, layout.value):
        span = side.offset + side.nbytes - side.params_offset
        pages[..., side.params_offset : side.params_offset + span] = tame.repeat(span // 2)
    return pages


def bench(kv_heads: int = 8, group: int = 4, dim: int = 128) -> None:
    """Times, shares of the read bandwidth and ratios to FP16."""
    big = torch.randn(1 << 29, device="cuda")
    bandwidth = big.numel() * 4 / median_us([big.sum])
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e6:.2f} TB/s")
    del big
    for batch, tokens in SHAPES:
        query = torch.randn(batch, kv_heads * group, dim, device="cuda").half()
        dense = fp16_us(query, tokens, kv_heads)
        print(f"batch {batch}, {tokens} tokens: FP16 {dense:.1f} us")
        for key_bits, value_bits in PAIRS:
            layout = page_layout(Format(key_bits, "per_channel", 64), Format(value_bits, "per_token", dim), dim)
            shape = (batch, kv_heads, tokens // 64)
            nbytes = torch.Size(shape).numel() * layout.nbytes
            caches = [random_pages(shape, layout) for _ in range(1 + COLD_BYTES // nbytes)]
            best = min(
                median_us([attention(query, pages, layout, splits=splits, warps=warps) for pages in caches])
                for warps in (4, 8)
                if 2 * warps * layout.nbytes <= SHARED_BYTES
                for splits in {max(1, ctas // (batch * kv_heads)) for ctas in (132, 264, 528)}
                if splits * warps <= 2 * shape[2]
            )
            share = nbytes / best / bandwidth
            print(f"  K{key_bits}V{value_bits} {best:6.1f} us  {share:4.0%} of reads  {dense / best:.2f} x FP16")


if __name__ == "__main__":
    check()
    bench()

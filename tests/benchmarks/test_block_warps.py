"""The caches that `benchmarks.block_warps` times are ones that attention can read."""

from __future__ import annotations

import torch

from benchmarks import block_warps
from kvloom import kernels
from kvloom.assets import shape_config
from kvloom.plan import head_layouts, preset


def test_a_cache_has_its_tiles_and_pages():
    config = shape_config(block_warps.SHAPE)
    layout = head_layouts(preset("kvloom/K2V2", config).spec(0), block_warps.HEADS, config.head_dim, 2)[0]
    kv = block_warps.store(layout, 2 * block_warps.HEADS, 3, torch.device("cpu"))
    tokens = block_warps.SINKS + 3 * layout.page_tokens + layout.page_tokens // 2
    assert kv.levels().tolist() == [[tokens, 3]] * 2
    query = torch.randn(2, block_warps.HEADS * block_warps.GROUP, 1, layout.head_dim, dtype=torch.bfloat16)
    out = kernels.attend_static(query, kv, scaling=0.1)
    assert out.shape == (2, 1, *query.shape[1::2])

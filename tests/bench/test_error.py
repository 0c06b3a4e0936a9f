from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvloom.bench import Pair, Shape
from kvloom.bench._caches import packed_cache, random_cache, random_dense, random_query
from kvloom.bench._error import exact_attention, exact_paged_attention, poisoned, relative_error
from kvloom.kernels import backend

CPU = torch.device("cpu")
SHAPE = Shape(2, 256)


def test_relative_error():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), expected))


def test_exact_attention_is_attention(grid):
    query = random_query(grid, SHAPE, CPU)
    key, value = random_dense(grid, SHAPE, 256, CPU)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), enable_gqa=True, scale=grid.scaling
    )
    torch.testing.assert_close(exact_attention(query, key, value, grid.scaling), expected.squeeze(2))


@pytest.mark.parametrize("pair", [Pair(4, 2), Pair(3, 5), Pair(16, 1), Pair(8, 16)])
@pytest.mark.parametrize("window", [0, 8])
def test_the_reference_reads_what_the_backend_packed(grid, pair: Pair, window: int):
    grid = replace(grid, pairs=(pair,), window=window)
    chosen = backend(CPU)
    for kv in (packed_cache(chosen, grid, SHAPE, pair, CPU), random_cache(grid, SHAPE, pair, CPU)):
        query = random_query(grid, SHAPE, CPU)
        out = chosen.attend(query, kv, scaling=grid.scaling).squeeze(1)
        assert kv.length == 256 + window
        assert relative_error(out, exact_paged_attention(query, kv, grid.scaling)) < 1e-5


def test_keys_have_an_outlier_channel(grid):
    key, value = random_dense(grid, SHAPE, 256, CPU)
    assert key.mean(dim=(0, 1, 2)).argmax() == 5
    assert key[..., 5].mean() > 7
    assert value.abs().mean() < 1


def test_random_codes_use_every_byte_and_parameters_stay_tame(grid):
    kv = random_cache(grid, SHAPE, Pair(4, 2), CPU)
    data, layout = kv.pages[0].data, kv.pages[0].layout
    scales = (
        data[..., layout.key.params_offset : layout.key.offset + layout.key.nbytes].contiguous().view(torch.float16)
    )
    assert 0.004 < scales.min() < scales.max() < 0.016
    assert len(data[..., : layout.key.params_offset].unique()) == 256


def test_what_nobody_writes_is_nan_when_poisoned():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with poisoned():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.zeros(10)).isnan().all()
        assert torch.zeros(3).new_empty(50).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill

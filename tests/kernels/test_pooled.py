"""Pages and exact tokens in blocks: attention is float64's, and every step leaves the reference's bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvloom import kernels
from kvloom.kernels._torch import TORCH
from kvloom.pages import Format, HeadPages, PooledKV, page_layout
from tests.kernels.pooled import next_step, pooled
from tests.kernels.tabled import Tabled, mixed_layouts, tabled_case

DIMS = (64, 80, 96, 128, 256)
GPU = torch.device("cuda")


@pytest.mark.parametrize("seed", range(12))
def test_the_reference_reads_what_float64_does(seed: int) -> None:
    case = tabled_case(seed, mixed_layouts(seed, DIMS[seed % len(DIMS)]))
    out = TORCH.attend_pooled(case.query, pooled(case.kv)[0], scaling=0.1)
    assert torch.allclose(out.double(), case.expected(0.1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_the_reference_appends_what_a_cache_of_fixed_size_does(seed: int) -> None:
    """Pages fill on the way; blocks of no sequence stay as they are, the null block too."""
    case = tabled_case(seed, mixed_layouts(seed, 64), most=2)
    kv, storage = pooled(case.kv, 90)
    others = sorted(set(range(len(storage))) - set(kv.table.flatten().tolist()))
    before = storage[others].clone()
    for step in range(90):
        kv = next_step(kv)
        key, value = torch.randn(2, len(kv.table), *kv.shape[1:2], 1, 64, generator=torch.Generator().manual_seed(step))
        expected = kv.gathered(with_new=False)
        TORCH.append(key, value, expected)
        TORCH.append_pooled(key, value, kv)
        for row, (tokens, pages) in enumerate(expected.levels().tolist()):
            own = slice(row, row + 1)
            for got, wanted in zip(
                _parts(kv.gathered(with_new=True), own, tokens, pages),
                _parts(expected, own, tokens, pages),
                strict=True,
            ):
                assert got.equal(wanted)
    assert int(kv.before[:, 1].min()) >= 1
    assert storage[others].equal(before)


def _parts(kv, rows, tokens, pages):
    paged = kv.paged(rows, tokens, pages).in_order()
    exact = (paged.sinks.key, paged.sinks.value, paged.tail.key, paged.tail.value)
    return (*exact, *(group.data for group in paged.pages))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(60))
def test_on_a_gpu_attention_is_float64s(seed: int, dtype: torch.dtype) -> None:
    dim = DIMS[seed % len(DIMS)]
    case = tabled_case(seed, mixed_layouts(seed % 9, dim, 2), device="cuda", dtype=dtype, most=(2, 9, 40)[seed % 3])
    softcap = (None, 20.0)[seed % 2]
    kv, expected = pooled(case.kv)[0], case.expected(dim**-0.5, softcap)
    out = torch.full(expected.shape, torch.nan, dtype=dtype, device="cuda")
    got = kernels.backend(GPU).attend_pooled(case.query, kv, out, scaling=dim**-0.5, softcap=softcap)
    assert got.data_ptr() == out.data_ptr()
    assert float((out.double().cpu() - expected).norm() / expected.norm()) < (2e-3 if dtype == torch.float16 else 8e-3)
    again = kernels.backend(GPU).attend_pooled(case.query, kv, scaling=dim**-0.5, softcap=softcap)
    assert again.equal(out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_on_a_gpu_steps_leave_the_references_bytes(seed: int, dtype: torch.dtype) -> None:
    assert_same_steps(tabled_case(seed, mixed_layouts(seed, DIMS[seed % len(DIMS)], 2), dtype=dtype, most=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
def test_on_a_gpu_steps_turn_what_they_append(dim: int, dtype: torch.dtype) -> None:
    """Heads of one layout turn both sides, those of the other the values alone."""
    key, turned = Format(4, "per_channel", 64), Format(3, "per_channel", 64, rotation="hadamard")
    value = Format(2, "per_token", dim, rotation="hadamard")
    layouts = tuple(page_layout(fmt, value, dim, 2) for fmt in (key, turned, key))
    assert_same_steps(tabled_case(dim, layouts, dtype=dtype, most=2))


def assert_same_steps(case: Tabled) -> None:
    ours, blocks = pooled(case.kv, 90)
    theirs, expected = _on_gpu(ours, blocks)
    for step in range(90):
        ours, theirs = next_step(ours), next_step(theirs)
        generator = torch.Generator().manual_seed(step)
        states = torch.randn(2, len(ours.table), ours.shape[1], 1, ours.shape[3], generator=generator)
        states = states.to(case.query.dtype)
        TORCH.append_pooled(*states, ours)
        kernels.backend(GPU).append_pooled(*states.to(GPU), theirs)
        assert expected.cpu().equal(blocks), step
    assert not theirs.flags.any()


def _on_gpu(kv: PooledKV, blocks: torch.Tensor) -> tuple[PooledKV, torch.Tensor]:
    """A copy, views of the blocks included."""
    storage, groups, start = blocks.to(GPU), [], 0
    for group in kv.pages:
        stop = start + len(group.heads) * group.layout.nbytes
        data = storage[:, start:stop].unflatten(1, (len(group.heads), -1)).transpose(0, 1)[None]
        groups.append(HeadPages(group.heads, group.layout, data))
        start = stop
    rows = storage[:, : kv.rows[0].numel() * kv.rows.itemsize].view(kv.rows.dtype).unflatten(1, kv.rows.shape[1:])
    levels = {name: getattr(kv, name).to(GPU) for name in ("table", "before", "state", "flags", "filled")}
    return replace(kv, pages=tuple(groups), rows=rows, **levels), storage

"""Attention on CUDA over pages that a table finds in shared blocks, in float64; unpacking, as the reference does."""

from __future__ import annotations

import random

import pytest
import torch

from kvloom.kernels import _cuda, backend
from kvloom.kernels._torch import TORCH
from kvloom.kernels._triton import TritonBackend
from kvloom.pages import Format, page_layout
from tests.kernels.tabled import attention, mixed_layouts, tabled_case

pytestmark = pytest.mark.gpu

CASES, LAYOUTS = 60, 10
DIMS = (64, 80, 96, 128, 256)


def drawn(seed: int):
    """A case, its dtype and its soft cap: few kernels, many shapes."""
    kernel, rng = random.Random(seed % LAYOUTS), random.Random(seed)
    dtype = kernel.choice([torch.float16, torch.bfloat16])
    layouts = mixed_layouts(seed % LAYOUTS, DIMS[seed % len(DIMS)], 2)
    batch, most = rng.choice([(2, 40), (5, 6), (33, 2)])
    case = tabled_case(seed, layouts, device="cuda", dtype=dtype, most=most, batch=batch)
    return case, dtype, 20.0 if seed % LAYOUTS == 0 else None


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("seed", range(CASES))
def test_attention_of_every_sequence_is_float64s(seed: int, monkeypatch) -> None:
    """Shuffled and shared blocks, uneven lengths, one token, heads of other bits, up to 16 query heads a KV head."""
    monkeypatch.delattr("kvloom.kernels._base.Backend.attend_static")
    case, dtype, softcap = drawn(seed)
    out = backend(case.query.device).attend_static(case.query, case.kv, scaling=0.1, softcap=softcap)
    assert error(out, case.expected(0.1, softcap)) < (4e-3 if dtype == torch.float16 else 1.5e-2)


@pytest.mark.parametrize("seed", range(0, CASES, 3))
@pytest.mark.parametrize("queries", [3, 64])
def test_several_tokens_of_a_sequence_are_float64s(seed: int, queries: int) -> None:
    """Few of them by the kernel, many by attention over what it unpacks."""
    case, dtype, _ = drawn(seed)
    row = int(case.kv.levels()[:, 0].argmax())
    kv, query, states = case.one(row, queries)
    out = backend(query.device).attend(query, kv, scaling=0.1)
    assert error(out[0], attention(query[0], states, 0.1)) < (4e-3 if dtype == torch.float16 else 1.5e-2)


@pytest.mark.parametrize("seed", range(LAYOUTS))
def test_unpacking_is_the_references(seed: int, monkeypatch) -> None:
    case, dtype, _ = drawn(seed)
    wanted = [TORCH.decode(group.data, group.layout, dtype, case.kv.table) for group in case.kv.pages]
    monkeypatch.delattr("kvloom.kernels._torch.TorchBackend.decode")
    for group, sides in zip(case.kv.pages, wanted, strict=True):
        ours = backend(case.query.device).decode(group.data, group.layout, dtype, case.kv.table)
        for got, want in zip(ours, sides, strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_contiguous_pages_and_a_table_of_them_give_the_same_bits() -> None:
    layout = page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 128), 128)
    case = tabled_case(3, (layout,) * 4, device="cuda", dtype=torch.float16, most=40, batch=8)
    for row, (tokens, pages) in enumerate(case.kv.levels().tolist()):
        if pages:
            kv = case.kv.paged(slice(row, row + 1), tokens, pages)
            ways = [_cuda.attend_pages(case.query[row : row + 1], each, scaling=0.1)[0] for each in (kv, kv.in_order())]
            assert torch.equal(*ways)


@pytest.mark.parametrize("seed", range(4))
def test_tritons_is_float64s(seed: int, monkeypatch) -> None:
    monkeypatch.delattr("kvloom.kernels._base.Backend._attend_static")
    case, dtype, softcap = drawn(seed)
    out = TritonBackend().attend_static(case.query, case.kv, scaling=0.1, softcap=softcap)
    assert error(out, case.expected(0.1, softcap)) < (4e-3 if dtype == torch.float16 else 1.5e-2)

"""Attention on CUDA over pages of kept tokens, of which every head has another number, against float64."""

from __future__ import annotations

import random

import pytest
import torch

from kvloom.kernels import _cuda
from kvloom.kernels._triton import TritonBackend
from kvloom.pages import Format, page_layout
from tests.kernels.kept import PATTERNS, formats, kept_case

pytestmark = pytest.mark.gpu

CASES, LAYOUTS = 90, 6


@pytest.mark.parametrize("seed", range(CASES))
def test_attention_is_float64s(seed: int) -> None:
    """Few kernels, many shapes: heads without a page, left padding, holes, several queries, two layouts in a layer."""
    kernel = random.Random(seed % LAYOUTS)
    dim, dtype = kernel.choice([64, 80, 128]), kernel.choice([torch.float16, torch.bfloat16])
    choice = [page_layout(*formats(kernel, dim), dim) for _ in range(2)]
    rng = random.Random(seed)
    layouts = tuple(rng.choice(choice) for _ in range(rng.randint(1, 4)))
    softcap = 20.0 if seed % LAYOUTS == 0 else None
    case = kept_case(
        seed, layouts=layouts, device="cuda", dtype=dtype, pattern=PATTERNS[seed % 3], most=rng.choice([2, 6, 40])
    )
    poison = torch.full((1 << 22,), torch.nan, device="cuda")
    del poison
    out, _ = _cuda.attend_pages(case.query, case.kv, scaling=dim**-0.5, mask=case.mask, softcap=softcap)
    expected = case.expected(dim**-0.5, softcap)
    error = float((out.double().cpu() - expected).norm() / expected.norm())
    assert error < (4e-3 if dtype == torch.float16 else 1.5e-2)


def test_nothing_falls_back(monkeypatch) -> None:
    monkeypatch.delattr("kvloom.kernels._torch.TorchBackend.attend")
    layout = page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 128), 128)
    for pattern in PATTERNS:
        case = kept_case(3, layouts=(layout,) * 4, device="cuda", dtype=torch.float16, pattern=pattern, most=40)
        _cuda.CudaBackend(torch.device("cuda", 0)).attend(case.query, case.kv, scaling=0.1, mask=case.mask)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("queries", [1, 3])
def test_tritons_is_float64s(pattern: str, queries: int) -> None:
    layout = page_layout(Format(4, "per_channel", 64), Format(2, "per_token", 128), 128)
    case = kept_case(
        7, layouts=(layout,) * 3, device="cuda", dtype=torch.float16, pattern=pattern, most=6, queries=queries
    )
    out = TritonBackend().attend(case.query, case.kv, scaling=0.1, mask=case.mask)
    expected = case.expected(0.1)
    assert float((out.double().cpu() - expected).norm() / expected.norm()) < 4e-3

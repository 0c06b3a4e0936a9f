"""Attention over pages of kept tokens, of which every head has another number, against float64 on the same codes."""

from __future__ import annotations

import importlib.util
import os
import random

import pytest
import torch

from kvloom.kernels import INVARIANT, backend
from kvloom.kernels._torch import TORCH
from kvloom.kernels._triton import TritonBackend
from kvloom.pages import page_layout
from tests.kernels.kept import PATTERNS, formats, kept_case

needs_triton = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="triton's interpreter is off",
)


@pytest.mark.parametrize("seed", range(60))
def test_the_reference_reads_what_every_head_keeps(seed):
    case = kept_case(seed)
    softcap = 20.0 if seed % 5 == 0 else None
    for each in (TORCH, backend(torch.device("cpu")), INVARIANT):
        out = each.attend(case.query, case.kv, scaling=0.1, mask=case.mask, softcap=softcap)
        torch.testing.assert_close(out.double(), case.expected(0.1, softcap), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_additive_masks_are_by_place_too(seed):
    case = kept_case(seed, pattern="holes")
    mask = torch.zeros(case.mask.shape).masked_fill(~case.mask, torch.finfo(torch.float32).min)
    out = TORCH.attend(case.query, case.kv, scaling=0.1, mask=mask)
    torch.testing.assert_close(out.double(), case.expected(0.1), atol=1e-5, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("pattern", PATTERNS)
def test_triton_reads_what_every_head_keeps(pattern):
    rng = random.Random(0)
    layouts = tuple(page_layout(*formats(rng, 64), 64, 4) for _ in range(2))
    for seed, queries in ((1, 1), (2, 3)):
        case = kept_case(seed, layouts=layouts, pattern=pattern, most=2, queries=queries)
        out = TritonBackend().attend(case.query, case.kv, scaling=0.1, mask=case.mask)
        torch.testing.assert_close(out.double(), case.expected(0.1), atol=1e-4, rtol=1e-4)

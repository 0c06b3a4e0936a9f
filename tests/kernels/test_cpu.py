"""The compiled product of the CPU backend against the reference, and life without a compiler."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import kernels
from kvloom.errors import KernelError
from kvloom.kernels import _cpu, _registry
from kvloom.kernels._cpu import CpuBackend
from kvloom.kernels._torch import TORCH
from kvloom.pages import Format, page_layout
from tests.kernels.codebooks import CASES, codebook_formats

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, _cpu._compilers())), reason="no C compiler")


@pytest.fixture
def fresh() -> Iterator[None]:
    caches = (_cpu._library, _registry._known, _registry._fastest)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@needs_compiler
@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    group=st.sampled_from([16, 64, 128]),
    symmetric=st.booleans(),
    lead=st.integers(1, 3),
    n=st.integers(1, 3),
    m=st.sampled_from([1, 3, 16, 17]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_the_c_products_are_the_reference(bits, head_dim, group, symmetric, lead, n, m, seed) -> None:
    value_group = next(size for size in (group, 16) if head_dim % size == 0)
    key, value = Format(bits, "per_channel", group, symmetric), Format(bits, "per_token", value_group, symmetric)
    layout = page_layout(key, value, head_dim)
    torch.manual_seed(seed)
    tokens = n * layout.page_tokens
    pages = TORCH.encode(*torch.randn(2, 1, lead, tokens, head_dim), layout)[0]
    q, weights = torch.randn(lead, m, head_dim), torch.rand(lead, m, tokens + 3)[..., 3:]  # as sliced by attention
    c = CpuBackend()
    for name, x, side in (("packed_scores", q, layout.key), ("packed_values", weights, layout.value)):
        expected = getattr(TORCH, name)(x.double(), pages, side, torch.float32)
        got = getattr(c, name)(x, pages, side, torch.float32)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-3)  # sums of +-400 cancel


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("case", range(CASES))
def test_the_c_products_look_points_up(case: int, head_dim: int, monkeypatch) -> None:
    layout = page_layout(*codebook_formats(case, head_dim), head_dim)
    torch.manual_seed(case)
    pages = TORCH.encode(*torch.randn(2, 1, 2, 3 * 64, head_dim), layout)[0]
    q, weights = torch.randn(2, 3, head_dim), torch.rand(2, 3, 3 * 64)
    c = CpuBackend()
    for name, x, side in (("packed_scores", q, layout.key), ("packed_values", weights, layout.value)):
        expected = getattr(TORCH, name)(x.double(), pages, side, torch.float32)
        with monkeypatch.context() as patch:
            if _cpu._served(x, side):
                patch.delattr(f"kvloom.kernels._torch.TorchBackend.{name}")
            got = getattr(c, name)(x, pages, side, torch.float32)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-4)
    served = [_cpu._served(q, layout.key), _cpu._served(weights, layout.value)]
    assert served == [case % 2 == 0 and all(p.is_byte_separable for p in s.planes) for s in (layout.key, layout.value)]


@needs_compiler
def test_the_default_on_a_cpu_is_compiled(fresh: None) -> None:
    assert kernels.backend(CPU).name == "c"


def test_without_a_compiler_the_reference_serves(fresh, monkeypatch, caplog) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING, "kvloom"):
        assert kernels.backend(CPU) is TORCH
        assert kernels.backend(CPU) is TORCH
    assert [record.getMessage() for record in caplog.records] == [
        "kvloom's c kernels are not used: there is no C compiler (cc, gcc or clang)."
    ]


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    with pytest.raises(KernelError, match="no such target"):
        CpuBackend()
    assert kernels.backend(CPU) is TORCH


@needs_compiler
def test_a_folder_that_cannot_be_written_is_said(fresh, monkeypatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("KVLOOM_CACHE", str(blocked))
    with pytest.raises(KernelError, match="cannot be built"):
        CpuBackend()


@needs_compiler
def test_a_damaged_library_is_said(fresh, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "good"))
    CpuBackend()
    (built,) = (tmp_path / "good" / "kernels").iterdir()
    damaged = tmp_path / "damaged" / "kernels" / built.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not a library")
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "damaged"))
    _cpu._library.cache_clear()
    with pytest.raises(KernelError, match="cannot be built or loaded"):
        CpuBackend()

"""Attention on CUDA against float64 on the same codes; compiling needs no device and is tested everywhere."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch

from kvloom.errors import KernelError
from kvloom.kernels import _cuda, _cuda_pages, _nvrtc, backend
from kvloom.kernels._cuda_launch import Kernel, block_warps
from kvloom.kernels._torch import TORCH, _decode_side
from kvloom.pages import ExactKV, Format, HeadPages, PagedKV, PageLayout, page_layout, page_tokens_of
from tests.kernels.codebooks import CASES as CODEBOOK_CASES
from tests.kernels.codebooks import codebook_formats

LAYOUTS = 24
# KVLOOM_CASES=2000 draws more, of the same number of kernels.
CASES = int(os.environ.get("KVLOOM_CASES", 10 * LAYOUTS))


# As if a multiprocessor had so many row tiles and pages to read: blocks of 12 or 8 warps, of 2, and of 1.
LOADS = (None, (1, 1000), (4, 100), (8, 100))


@dataclass(frozen=True)
class Case:
    layout: PageLayout
    dtype: torch.dtype
    masked: bool
    softcap: float | None
    group: int
    queries: int
    heads: int
    batch: int
    pages: int
    sinks: int
    tail: int
    magnitude: float
    padded: bool
    sink_logits: bool
    seed: int


def random_layout(rng: random.Random) -> PageLayout:
    dim = rng.choice([64, 80, 96, 128, 128, 256])
    formats = []
    for usual, other in (("per_channel", "per_token"), ("per_token", "per_channel")):
        grouping = usual if rng.random() < 0.6 else other
        sizes = [32, 64, 128] if grouping == "per_channel" else [s for s in (16, 32, 64, 128, dim) if dim % s == 0]
        formats.append(Format(rng.choice([1, 2, 3, 4, 5, 6, 8, 16]), grouping, rng.choice(sizes), rng.random() < 0.3))
    return page_layout(*formats, dim, 2, page_tokens_of(*formats))


def random_case(seed: int) -> Case:
    """Shapes differ with every seed, compiled kernels repeat."""
    kernel, rng = random.Random(seed % LAYOUTS), random.Random(seed)
    layout = random_layout(kernel)
    dtype = torch.bfloat16 if kernel.random() < 0.4 else torch.float16
    masked, softcap = kernel.random() < 0.5, 20.0 if kernel.random() < 0.2 else None
    group = rng.choice([1, 2, 3, 4, 7, 8, 9, 16])
    queries = rng.choice([n for n in (1, 2, 3, 5) if n * group <= layout.page_tokens]) if masked else 1
    return Case(
        layout,
        dtype,
        masked,
        softcap,
        group,
        queries,
        heads=rng.randint(1, 3),
        batch=rng.randint(1, 3),
        pages=rng.choice([1, 2, 5, 17, 40]),
        sinks=rng.choice([0, 1, 4, 16, 20]),
        tail=max(queries, rng.choice([1, 5, 16, 33, 70])),
        magnitude=rng.choice([1.0, 1.0, 1.0, 300.0, 1e-3]),
        padded=rng.random() < 0.5,
        sink_logits=rng.random() < 0.3,
        seed=seed,
    )


def states(case: Case) -> tuple[PagedKV, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A cache, a query, and the keys and values that the cache stands for."""
    g = torch.Generator("cuda").manual_seed(case.seed)
    layout, lead = case.layout, (case.batch, case.heads)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
    key, value = (case.magnitude * draw(2, *lead, case.pages * layout.page_tokens, layout.head_dim)).to(case.dtype)
    key[..., 5] *= 8
    data = TORCH.encode(key, value, layout)
    sinks, tail = (
        ExactKV(*(draw(*lead, n, layout.head_dim).to(case.dtype) for _ in range(2))) for n in (case.sinks, case.tail)
    )
    length = case.sinks + case.pages * layout.page_tokens + case.tail
    visible = torch.full((case.queries,), case.pages, device="cuda")
    heads = tuple(range(case.heads))
    kv = PagedKV((HeadPages(heads, layout, data),), sinks, tail, length, layout.page_tokens, case.pages, visible)
    query = draw(case.batch, case.queries, case.heads * case.group, layout.head_dim) * 2 / case.magnitude
    packed = [
        exact.float() if side.fmt.is_passthrough else _decode_side(data, side, torch.float32)
        for exact, side in ((key, layout.key), (value, layout.value))
    ]
    whole = (
        torch.cat([getattr(sinks, name).float(), part, getattr(tail, name).float()], dim=2).double()
        for name, part in zip(("key", "value"), packed, strict=True)
    )
    return kv, query.to(case.dtype).transpose(1, 2), *whole


def case_mask(case: Case, length: int) -> torch.Tensor:
    """Boolean ``[batch, 1, queries, length]``: causal, and left padding of every sequence but the first."""
    ones = torch.ones(case.queries, length, dtype=torch.bool, device="cuda")
    mask = ones.tril(length - case.queries).expand(case.batch, 1, -1, -1).clone()
    for b in range(case.batch if case.padded else 0):
        mask[b, :, :, : b * 37 % (length - case.tail)] = False
    return mask


def rounding(query: torch.Tensor, key: torch.Tensor, case: Case, scaling: float) -> float:
    """What rounding query times scale to fp16 does to the worst score, one and a half standard deviations.

    The products are with codes, so with distances from a channel's least value: far more than the values where a
    channel is far from zero.
    """
    codes = (key - key.amin(2, keepdim=True)).repeat_interleave(case.group, 1)
    return 1.5 * scaling * 2**-12 * float((query.double().square() @ codes.square().transpose(-1, -2)).sqrt().max())


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(CASES))
def test_attention_is_float64s(seed: int, monkeypatch) -> None:
    case = random_case(seed)
    if load := LOADS[(seed + seed // LAYOUTS) % len(LOADS)]:
        own = block_warps
        monkeypatch.setattr(
            "kvloom.kernels._cuda_launch.block_warps", lambda layout, tiles, pages, limit: own(layout, *load, limit)
        )
    kv, query, key, value = states(case)
    mask = case_mask(case, kv.length)
    given = mask if case.masked and (case.padded or case.queries == 1) else None
    logits = torch.randn(query.shape[1], device="cuda") if case.sink_logits else None
    poison = torch.full((1 << 22,), torch.nan, device="cuda")
    del poison
    scaling = case.layout.head_dim**-0.5
    out, lse = _cuda.attend_pages(
        query, kv, scaling=scaling, mask=given, softcap=case.softcap, sink_logits=logits, lse=True
    )
    scores = query.double() @ key.repeat_interleave(case.group, 1).transpose(-1, -2) * scaling
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    seen = mask if given is not None or case.queries > 1 else torch.ones_like(mask)
    if given is None and case.queries > 1:
        seen = case_mask(Case(**{**vars(case), "padded": False}), kv.length)
    scores = scores.masked_fill(~seen, -math.inf)
    if logits is not None:
        extra = logits.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], dim=-1)
    expected = (scores.softmax(-1)[..., : kv.length] @ value.repeat_interleave(case.group, 1)).transpose(1, 2)
    error = float((out.double() - expected).norm() / expected.norm())
    bound = rounding(query, key, case, scaling)
    assert error < max(2e-3 if case.dtype == torch.float16 else 1.2e-2, bound)
    assert lse is not None
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=max(1e-2, 2 * bound))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("number", range(CODEBOOK_CASES))
def test_codebooks_are_float64s(number: int, head_dim: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.delattr("kvloom.kernels._torch.TorchBackend.attend")  # nothing falls back
    layout = page_layout(*codebook_formats(number, head_dim), head_dim)
    for magnitude, pages, group in ((1.0, 40, 4), (300.0, 2, 8), (1e-3, 5, 1)):
        shape = {"group": group, "queries": 1, "heads": 2, "batch": 2, "pages": pages, "sinks": 4, "tail": 33}
        case = Case(
            layout, dtype, False, None, magnitude=magnitude, padded=False, sink_logits=False, seed=number, **shape
        )
        kv, query, key, value = states(case)
        out = backend(query.device).attend(query, kv, scaling=head_dim**-0.5)
        scores = query.double() @ key.repeat_interleave(group, 1).transpose(-1, -2) * head_dim**-0.5
        expected = (scores.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2)
        error = float((out.double() - expected).norm() / expected.norm())
        assert error < max(2e-3 if dtype == torch.float16 else 1.2e-2, rounding(query, key, case, head_dim**-0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("queries", "held"), [(300, 0), (300, 37), (129, 5)])
def test_a_prompt_that_goes_on_behind_pages(dim: int, queries: int, held: int) -> None:
    """More queries than a page has tokens; the last ``held`` tokens before them are exact."""
    formats = Format(4, "per_channel", 64, False), Format(3, "per_token", dim, False)
    layout = page_layout(*formats, dim, 2, page_tokens_of(*formats))
    case = Case(
        layout, torch.bfloat16, False, None, 4, queries, 2, 2, 7, 4, queries + held, 1.0, False, False, seed=dim
    )
    kv, query, key, value = states(case)
    scaling = dim**-0.5
    got = backend(query.device).attend(query, kv, scaling=scaling).double()
    scores = query.double().unflatten(1, (2, 4)) @ key[:, :, None].transpose(-1, -2) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(key.shape[2] - queries + 1)
    wanted = (scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[:, :, None]).flatten(1, 2).transpose(1, 2)
    assert float((got - wanted).norm() / wanted.norm()) < 8e-3


@pytest.mark.gpu
def test_layers_differ_by_their_points_alone() -> None:
    """One module serves every codebook."""
    fmt = Format(3, "per_token", 128, codec="nuq", codebook=tuple(i / 3.5 - 1 for i in range(8)))
    other = replace(fmt, codebook=tuple((i / 3.5 - 1) ** 3 for i in range(8)))
    before = _nvrtc._module.cache_info().misses
    for each in (fmt, other):
        layout = page_layout(each, each, 128)
        case = Case(layout, torch.float16, False, None, 4, 1, 2, 1, 5, 0, 5, 1.0, False, False, 0)
        kv, query, key, value = states(case)
        out = _cuda.attend_pages(query, kv, scaling=0.1)[0]
        scores = query.double() @ key.repeat_interleave(4, 1).transpose(-1, -2) * 0.1
        expected = (scores.softmax(-1) @ value.repeat_interleave(4, 1)).transpose(1, 2)
        assert float((out.double() - expected).norm() / expected.norm()) < 2e-3
    assert _nvrtc._module.cache_info().misses <= before + 1


@pytest.mark.gpu
def test_heads_of_different_layouts() -> None:
    torch.manual_seed(0)
    dim, pages = 128, 3
    narrow = page_layout(Format(2, "per_channel", 64), Format(2, "per_token", dim), dim)
    broad = page_layout(Format(4, "per_channel", 64), Format(6, "per_token", dim), dim)
    key, value = torch.randn(2, 2, 3, pages * 64, dim, device="cuda").half()
    groups = tuple(
        HeadPages(heads, layout, TORCH.encode(key[:, list(heads)], value[:, list(heads)], layout))
        for heads, layout in (((0, 2), narrow), ((1,), broad))
    )
    exact = ExactKV(*torch.randn(2, 2, 3, 5, dim, device="cuda").half())
    none = ExactKV(exact.key[:, :, :0], exact.value[:, :, :0])
    kv = PagedKV(groups, none, exact, pages * 64 + 5, 64, pages, torch.full((1,), pages, device="cuda"))
    query = torch.randn(2, 6, 1, dim, device="cuda").half()
    out = backend(query.device).attend(query, kv, scaling=0.1)
    assert float((out.float() - TORCH.attend(query.float(), kv, scaling=0.1)).norm() / out.float().norm()) < 2e-3


@pytest.mark.gpu
def test_a_graph_replays_attention() -> None:
    case = Case(**{**vars(random_case(0)), "masked": False, "queries": 1})
    kv, query, _, _ = states(case)
    device = backend(query.device)
    expected = device.attend(query, kv, scaling=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = device.attend(query, kv, scaling=0.1)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("number", "head_dim"), [(0, 64), (1, 80), (2, 128)])
def test_codebook_kernels_compile_without_a_device(number: int, head_dim: int) -> None:
    pytest.importorskip("cuda.core")
    layout = page_layout(*codebook_formats(number, head_dim), head_dim)
    defines = Kernel(layout, 4, number == 1, number).defines(clustered=number == 2)
    assert _nvrtc.cubin("attend.cu", defines, "sm_90")[:4] == b"\x7fELF"
    for tabled in (False, True):
        defines = _cuda_pages.decode_defines(layout, torch.float16, tabled=tabled)
        assert _nvrtc.cubin("decode.cu", defines, "sm_90")[:4] == b"\x7fELF"


@pytest.mark.parametrize(("arch", "clustered"), [("sm_80", False), ("sm_90", False), ("sm_90", True)])
@pytest.mark.parametrize("seed", [1, 5])
def test_kernels_compile_without_a_device(arch: str, clustered: bool, seed: int) -> None:
    pytest.importorskip("cuda.core")
    case = random_case(seed)
    warps = block_warps(case.layout, 1, 100, 227 * 1024)
    bf16 = case.dtype == torch.bfloat16
    for masked, pooled in ((seed % 3, False), (0, True)):
        kernel = Kernel(case.layout, warps, bf16, masked, case.softcap is not None, 2 * masked, pooled)
        assert _nvrtc.cubin("attend.cu", kernel.defines(clustered=clustered), arch)[:4] == b"\x7fELF"
        defines = _cuda_pages.encode_defines(case.layout, case.dtype, append=True, pooled=pooled)
        assert _nvrtc.cubin("encode.cu", defines, arch)[:4] == b"\x7fELF"


def test_kernels_that_cannot_be_built_give_way(monkeypatch, caplog) -> None:
    def unbuildable(*args: object) -> None:
        raise KernelError("NVRTC cannot compile for sm_99")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 9))
    monkeypatch.setattr(_nvrtc, "compiler_version", lambda: "0")
    monkeypatch.setattr(_nvrtc, "shared_limit", lambda device: 0)
    monkeypatch.setattr("kvloom.kernels._cuda_pages.encode", unbuildable)
    layout = page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 64), 64)
    device = _cuda.CudaBackend(torch.device("cuda", 0))
    key, value = torch.randn(2, 1, 1, 64, 64)
    in_float64 = (key.double(), value.double(), layout)  # not covered, which breaks nothing
    assert torch.equal(device.encode(*in_float64), TORCH.encode(*in_float64))
    assert not caplog.records
    for _ in range(2):
        assert torch.equal(device.encode(key, value, layout), TORCH.encode(key, value, layout))
    assert [record.getMessage() for record in caplog.records] == [
        "kvloom's cuda kernels give way to torch: NVRTC cannot compile for sm_99."
    ]


def test_blocks_fit_the_device() -> None:
    wide, raw = Format(4, "per_channel", 64), Format(16, "per_channel", 64)
    usual, largest = page_layout(wide, Format(4, "per_token", 128), 128), page_layout(raw, raw, 256)
    small = page_layout(wide, Format(2, "per_token", 128), 128)
    assert [block_warps(small, 1, pages, 227 * 1024) for pages in (1, 100, 200)] == [4, 8, 12]
    assert block_warps(usual, 1, 200, 227 * 1024) == 8
    assert block_warps(usual, 1, 100, 99 * 1024) == 4
    loads = [(2, 500), (4, 500), (8, 500), (40, 100), (40, 1000)]
    assert [block_warps(usual, *load, 227 * 1024) for load in loads] == [4, 2, 1, 1, 2]
    assert [block_warps(largest, 1, 100, limit * 1024) for limit in (227, 99)] == [1, 0]


def test_a_source_that_does_not_compile_is_one_sentence() -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(KernelError, match="NVRTC cannot compile for sm_90"):
        _nvrtc.cubin("attend.cu", (("D", 7),), "sm_90")

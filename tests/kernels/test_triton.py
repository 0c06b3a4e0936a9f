"""The Triton kernels, interpreted, against float64 attention and the reference's bytes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import CacheError, KernelError
from kvloom.kernels._torch import TORCH
from kvloom.kernels._triton import TritonBackend
from kvloom.pages import ExactKV, Format, HeadPages, PagedKV, page_layout
from tests.kernels.codebooks import codebook_formats
from tests.kernels.tabled import attention, mixed_layouts, tabled_case
from tests.kernels.test_attend import make, reference, with_queries

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="triton's interpreter is off",
)


@pytest.fixture(scope="module", autouse=True)
def bfloat16() -> Iterator[None]:
    """Triton 3.6's interpreter keeps bf16 as its bits: it rounds to them by cutting, and multiplies them in a dot."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def exact_dot(self: object, a: object, b: object, *rest: object) -> object:
        if a.dtype == tl.bfloat16:
            a, b = (interpreter.TensorHandle((x.data.astype("u4") << 16).view("f4"), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def exact_convert(x: object, source: object, target: object, rounding: object) -> object:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)
        return torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter.InterpreterBuilder.create_dot, interpreter._convert_float = exact_dot, exact_convert
    yield
    interpreter.InterpreterBuilder.create_dot, interpreter._convert_float = dot, convert


BITS = [1, 2, 3, 4, 5, 6, 8, 16]
DIMS = [64, 80, 96, 128, 256]


@st.composite
def sides(draw: st.DrawFn, head_dim: int, sizes: tuple[int, ...] = (16, 32, 64, 128)) -> Format:
    grouping = draw(st.sampled_from(["per_channel", "per_token"]))
    own = sizes if grouping == "per_channel" else [s for s in (16, 32, head_dim) if head_dim % s == 0]
    return Format(draw(st.sampled_from(BITS)), grouping, draw(st.sampled_from(own)), draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn) -> dict:
    head_dim = draw(st.sampled_from(DIMS))
    return {
        "head_dim": head_dim,
        "sides": (draw(sides(head_dim)), draw(sides(head_dim))),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from([1, 3, 4, 8])),
        "batch": draw(st.integers(1, 2)),
        "pages": draw(st.integers(1, 3)),
        "sinks": draw(st.sampled_from([0, 1, 4])),
        "queries": draw(st.sampled_from([1, 1, 2, 5])),
        "extra_tail": draw(st.integers(0, 70)),
        "softcap": draw(st.sampled_from([None, 20.0])),
        "has_sink": draw(st.booleans()),
        "mask": draw(st.sampled_from(["none", "bool", "additive"])),
        "seed": draw(st.integers(0, 2**31)),
    }


@interpreted
@given(case=cases())
@settings(max_examples=20)
def test_attend_equals_dense_float64(case: dict) -> None:
    queries, dtype = case["queries"], case["dtype"]
    kv = make(
        [(tuple(range(case["heads"])), *case["sides"])],
        batch=case["batch"],
        head_dim=case["head_dim"],
        pages=case["pages"],
        sinks=case["sinks"],
        tail=queries + case["extra_tail"],
        seed=case["seed"],
        dtype=dtype,
    )
    kv = with_queries(kv, queries)
    g = torch.Generator().manual_seed(case["seed"] + 1)
    shape = case["batch"], case["heads"] * case["group"], queries, case["head_dim"]
    query = torch.randn(shape, generator=g).to(dtype)
    sink = torch.randn(query.shape[1], generator=g) if case["has_sink"] else None
    mask = seen = None
    if case["mask"] != "none":
        seen = torch.ones(case["batch"], 1, queries, kv.length, dtype=torch.bool).tril(kv.length - queries)
        seen[0, :, :, : (kv.length - queries) // 2] = False
        additive = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        mask = seen if case["mask"] == "bool" else additive
    out = TritonBackend().attend(query, kv, scaling=0.125, mask=mask, softcap=case["softcap"], sink_logits=sink)
    expected = reference(query, kv, seen, case["softcap"], sink)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}[dtype]
    assert float((out.double() - expected).norm() / expected.norm()) < tolerance


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("case", range(4))
def test_codebooks_are_read_in_place(case: int, head_dim: int, dtype: torch.dtype, monkeypatch) -> None:
    key, value = codebook_formats(case, head_dim)
    kv = with_queries(make([((0, 1), key, value)], head_dim=head_dim, pages=2, sinks=1, dtype=dtype, seed=case), 1)
    (pages,) = kv.pages
    query = torch.randn(1, 6, 1, head_dim, generator=torch.Generator().manual_seed(case)).to(dtype)
    expected = reference(query, kv, None, None, None)
    decoded = TORCH.decode(pages.data, pages.layout, dtype)
    for name in ("decode", "attend"):
        monkeypatch.delattr(f"kvloom.kernels._torch.TorchBackend.{name}")
    for got, wanted in zip(TritonBackend().decode(pages.data, pages.layout, dtype), decoded, strict=True):
        assert torch.equal(got, wanted)
    out = TritonBackend().attend(query, kv, scaling=0.125)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-3
    assert float((out.double() - expected).norm() / expected.norm()) < tolerance


@interpreted
def test_heads_of_different_formats() -> None:
    k4, k2, v2 = Format(4, "per_channel", 64), Format(2, "per_channel", 32), Format(2, "per_token", 64)
    for queries in (1, 3):
        kv = with_queries(make([((0, 2), k4, v2), ((1,), k2, v2)], pages=3, tail=50), queries)
        query = torch.randn(1, 6, queries, 64)
        out = TritonBackend().attend(query, kv, scaling=0.125)
        expected = reference(query, kv, None, None, None)
        assert float((out - expected).norm() / expected.norm()) < 2e-5


@interpreted
def test_each_query_reads_its_own_pages() -> None:
    """Overlap: query i must read pages [0, visible[i]) packed and later slots from the tail."""
    fmt = Format(2, "per_channel", 64), Format(2, "per_token", 64)
    g = torch.Generator().manual_seed(1)
    tokens, queries = 130, 3
    k, v = torch.randn(2, 1, 1, tokens, 64, generator=g)
    layout = page_layout(*fmt, 64, 4)
    pages = HeadPages((0,), layout, TORCH.encode(k[:, :, :128], v[:, :, :128], layout))
    empty = ExactKV(k[:, :, :0], v[:, :, :0])
    visible = torch.tensor([(tokens - queries + i) // 64 for i in range(queries)])
    kv = PagedKV((pages,), empty, ExactKV(k, v), tokens, 64, 2, visible)
    query = torch.randn(1, 2, queries, 64, generator=g)
    out = TritonBackend().attend(query, kv, scaling=0.125)
    torch.testing.assert_close(out, TORCH.attend(query, kv, scaling=0.125), atol=1e-5, rtol=1e-5)


@interpreted
def test_a_query_that_may_read_nothing_stays_finite() -> None:
    kv = with_queries(make([((0,), Format(4, "per_channel", 64), Format(4, "per_token", 64))]), 2)
    query = torch.randn(1, 3, 2, 64)
    for mask in (torch.zeros(1, 1, 2, kv.length, dtype=torch.bool), torch.full((1, 1, 2, kv.length), -torch.inf)):
        assert bool(TritonBackend().attend(query, kv, scaling=0.125, mask=mask).isfinite().all())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-2, 6e4])
def test_elements_at_the_ends_of_fp16(dtype: torch.dtype, size: float) -> None:
    """Scales far from one neither overflow nor vanish in half-precision products."""
    for key, value in (("per_channel", "per_token"), ("per_token", "per_channel")):
        g = torch.Generator().manual_seed(2)
        layout = page_layout(Format(5, key, 64), Format(3, value, 64), 64, dtype.itemsize)
        k, v = (torch.rand(2, 1, 1, 128, 64, generator=g) * 2 * size - size).to(dtype)
        pages = HeadPages((0,), layout, TORCH.encode(k, v, layout))
        tail = ExactKV(k[:, :, :5], v[:, :, :5])
        kv = PagedKV((pages,), ExactKV(k[:, :, :0], v[:, :, :0]), tail, 133, 64, 2, torch.tensor([2]))
        query = (torch.randn(1, 4, 1, 64, generator=g) / size).to(dtype)
        expected = reference(query, kv, None, None, None)
        out = TritonBackend().attend(query, kv, scaling=0.125).double()
        assert float((out - expected).norm() / expected.norm()) < (2e-5 if dtype == torch.float32 else 4e-3)


@interpreted
@pytest.mark.parametrize("change", ["many rows", "float64", "a page of 256 tokens", "no pages"])
def test_what_the_kernels_do_not_cover_is_served(change: str) -> None:
    key = Format(4, "per_channel", 256 if change == "a page of 256 tokens" else 64)
    dtype = torch.float64 if change == "float64" else torch.float32
    queries = 40 if change == "many rows" else 1
    pages = 0 if change == "no pages" else 2
    kv = with_queries(make([((0,), key, Format(4, "per_token", 64))], tail=50, pages=pages, dtype=dtype), queries)
    query = torch.randn(1, 2, queries, 64).to(dtype)
    torch.testing.assert_close(TritonBackend().attend(query, kv, scaling=0.125), TORCH.attend(query, kv, scaling=0.125))


@st.composite
def page_cases(draw: st.DrawFn) -> dict:
    head_dim = draw(st.sampled_from([16, *DIMS]))
    sizes = (16, 32, 64, 128, 256)
    return {
        "head_dim": head_dim,
        "sides": (draw(sides(head_dim, sizes)), draw(sides(head_dim, sizes))),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "heads": draw(st.integers(1, 2)),
        "batch": draw(st.integers(1, 2)),
        "pages": draw(st.integers(1, 2)),
        "scale": draw(st.sampled_from([0.0, 1e-7, 1e-4, 1.0, 300.0, 2e4])),
        "offset": draw(st.sampled_from([0.0, -3.0, 1e3])),
        "seed": draw(st.integers(0, 2**31)),
    }


@interpreted
@given(case=page_cases())
@settings(max_examples=12)
def test_pages_are_the_references(case: dict) -> None:
    dtype, head_dim = case["dtype"], case["head_dim"]
    layout = page_layout(*case["sides"], head_dim, dtype.itemsize)
    g = torch.Generator().manual_seed(case["seed"])
    tokens = case["pages"] * layout.page_tokens
    shape = 2, case["batch"], case["heads"], tokens + 3, head_dim
    both = torch.randn(shape, generator=g).clamp(-3, 3) * case["scale"] + case["offset"]
    both[..., 7, :] = 0.0
    key, value = both.to(dtype)[..., :tokens, :]
    expected = TORCH.encode(key, value, layout)
    data = TritonBackend().encode(key, value, layout)
    assert torch.equal(data, expected)
    for got, wanted in zip(TritonBackend().decode(data, layout, dtype), TORCH.decode(data, layout, dtype), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, wanted)


@interpreted
def test_all_of_the_affine_family_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed by the codec, in torch; unpacked and attended to by the kernels."""
    kv = make([((0,), Format(4, "per_channel", 64), Format(2, "per_token", 32, codec="clipped"))], tail=5)
    (pages,) = kv.pages
    query = torch.randn(1, 2, 1, 64)
    expected = TORCH.decode(pages.data, pages.layout, torch.float32), TORCH.attend(query, kv, scaling=0.125)
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(TritonBackend().encode(x, x, pages.layout), TORCH.encode(x, x, pages.layout))
    for name in ("decode", "attend"):
        monkeypatch.delattr(f"kvloom.kernels._torch.TorchBackend.{name}")
    for got, wanted in zip(TritonBackend().decode(pages.data, pages.layout, torch.float32), expected[0], strict=True):
        assert torch.equal(got, wanted)
    torch.testing.assert_close(TritonBackend().attend(query, kv, scaling=0.125), expected[1])


@interpreted
def test_outliers_are_served_by_the_reference() -> None:
    kept = Format(2, "per_channel", 64, outliers=0.02)
    kv = make([((0,), kept, Format(2, "per_token", 64))], tail=5)
    (pages,) = kv.pages
    x, query = torch.randn(1, 1, 64, 64), torch.randn(1, 2, 1, 64)
    assert torch.equal(TritonBackend().encode(x, x, pages.layout), TORCH.encode(x, x, pages.layout))
    ours, theirs = (way.decode(pages.data, pages.layout, torch.float32) for way in (TritonBackend(), TORCH))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(TritonBackend().attend(query, kv, scaling=0.125), TORCH.attend(query, kv, scaling=0.125))


@interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -7e4])
def test_what_fp16_cannot_express_is_refused(bad: float) -> None:
    layout = page_layout(Format(4, "per_channel", 64), Format(4, "per_token", 64), 64, 4)
    key, value = torch.randn(2, 1, 2, 128, 64)
    value[0, 1, 100, 3] = bad
    with pytest.raises(CacheError, match="NaN, infinity"):
        TritonBackend().encode(key, value, layout)


def test_without_triton_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "kvloom.kernels._triton_attend", "kvloom.kernels._triton_pages"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(KernelError, match="triton is not installed"):
        TritonBackend()


@interpreted
@pytest.mark.parametrize(("seed", "head_dim", "dtype"), [(3, 64, torch.float32), (5, 80, torch.float16)])
def test_sequences_of_any_length_are_read_through_a_table_at_once(seed, head_dim, dtype, monkeypatch) -> None:
    case = tabled_case(seed, mixed_layouts(seed, head_dim, dtype.itemsize), dtype=dtype, most=2, batch=3)
    softcap = 20.0 if seed == 3 else None
    expected = case.expected(0.1, softcap)
    monkeypatch.delattr("kvloom.kernels._base.Backend._attend_static")
    out = TritonBackend().attend_static(case.query, case.kv, scaling=0.1, softcap=softcap)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-3
    assert float((out.double() - expected).norm() / expected.norm()) < tolerance


@interpreted
def test_several_tokens_of_a_sequence_are_read_through_a_table(monkeypatch) -> None:
    case = tabled_case(3, mixed_layouts(3, 64), most=2, batch=2)
    kv, query, states = case.one(1, 3)
    assert kv.num_pages == 2
    decoded = [TORCH.decode(group.data, group.layout, kv.dtype, kv.table) for group in kv.pages]
    for name in ("decode", "attend"):
        monkeypatch.delattr(f"kvloom.kernels._torch.TorchBackend.{name}")
    out = TritonBackend().attend(query, kv, scaling=0.1)
    torch.testing.assert_close(out[0].double(), attention(query[0], states, 0.1), atol=1e-4, rtol=1e-4)
    for group, sides in zip(kv.pages, decoded, strict=True):
        ours = TritonBackend().decode(group.data, group.layout, kv.dtype, kv.table)
        assert all(map(torch.equal, ours, sides))

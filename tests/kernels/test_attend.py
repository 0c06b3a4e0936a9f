"""Attention over pages against a dense float64 softmax on the same codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import ModelError
from kvloom.kernels import backend, dense_attention
from kvloom.kernels._torch import TORCH
from kvloom.pages import ExactKV, Format, HeadPages, PagedKV, page_layout, page_tokens_of
from tests.kernels.codebooks import CASES, codebook_formats

CPU = torch.device("cpu")


def make(
    layouts: list[tuple[tuple[int, ...], Format, Format]],
    *,
    batch: int = 1,
    head_dim: int = 64,
    pages: int = 2,
    sinks: int = 0,
    tail: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PagedKV:
    """Random cache; ``layouts`` lists (heads, key format, value format)."""
    g = torch.Generator().manual_seed(seed)
    heads = sum(len(h) for h, _, _ in layouts)
    tokens = page_tokens_of(*(f for _, k, v in layouts for f in (k, v)))
    exact = lambda n: torch.randn(batch, heads, n, head_dim, generator=g).to(dtype)  # noqa: E731
    packed = []
    for own, key, value in layouts:
        layout = page_layout(key, value, head_dim, dtype.itemsize, tokens)
        k, v = (torch.randn(batch, len(own), pages * tokens, head_dim, generator=g).to(dtype) for _ in range(2))
        k[..., 3] += 6
        packed.append(HeadPages(own, layout, backend(CPU).encode(k, v, layout)))
    return PagedKV(
        tuple(packed),
        ExactKV(exact(sinks), exact(sinks)),
        ExactKV(exact(tail), exact(tail)),
        sinks + pages * tokens + tail,
        tokens,
        pages,
        torch.zeros(0, dtype=torch.long),
    )


def reference(
    query: torch.Tensor,
    kv: PagedKV,
    mask: torch.Tensor | None,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Slow attention in float64: decode everything, concatenate by slot, softmax. Pages and tail must not overlap."""
    heads = kv.shape[1]
    keys, values = [], []
    for head in range(heads):
        group = next(g for g in kv.pages if head in g.heads)
        at = group.heads.index(head)
        k, v = backend(CPU).decode(group.data[:, at : at + 1], group.layout, kv.dtype)
        keys.append(torch.cat([kv.sinks.key[:, head : head + 1], k, kv.tail.key[:, head : head + 1]], 2))
        values.append(torch.cat([kv.sinks.value[:, head : head + 1], v, kv.tail.value[:, head : head + 1]], 2))
    key, value = torch.cat(keys, 1).double(), torch.cat(values, 1).double()
    repeats = query.shape[1] // heads
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query.double() @ key.transpose(-1, -2) * 0.125
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries = query.shape[2]
    causal = torch.ones(queries, kv.length, dtype=torch.bool).tril(kv.length - queries)[None, None]
    scores = scores.masked_fill(~(causal if mask is None else mask), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : kv.length]
    return (weights @ value).transpose(1, 2)


def with_queries(kv: PagedKV, queries: int) -> PagedKV:
    visible = torch.full((queries,), kv.num_pages)
    return PagedKV(kv.pages, kv.sinks, kv.tail, kv.length, kv.page_tokens, kv.num_pages, visible)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    head_dim = draw(st.sampled_from([16, 64, 80, 96, 128, 256]))
    sides = []
    for _ in range(2):
        grouping = draw(st.sampled_from(["per_channel", "per_token"]))
        sizes = [16, 32, 64, 128] if grouping == "per_channel" else [s for s in (16, 32, head_dim) if head_dim % s == 0]
        sides.append(
            Format(
                draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16])),
                grouping,
                draw(st.sampled_from(sizes)),
                draw(st.booleans()),
            )
        )
    return {
        "sides": sides,
        "head_dim": head_dim,
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from([1, 2, 3, 7, 16])),
        "batch": draw(st.integers(1, 2)),
        "pages": draw(st.integers(0, 3)),
        "sinks": draw(st.sampled_from([0, 1, 4])),
        "queries": draw(st.sampled_from([1, 2, 5])),
        "extra_tail": draw(st.integers(0, 70)),
        "softcap": draw(st.sampled_from([None, 20.0])),
        "sink_logits": draw(st.booleans()),
        "padded": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_attend_equals_dense_float64(case: dict) -> None:
    queries, heads = case["queries"], case["kv_heads"]
    kv = make(
        [(tuple(range(heads)), *case["sides"])],
        batch=case["batch"],
        head_dim=case["head_dim"],
        pages=case["pages"],
        sinks=case["sinks"],
        tail=queries + case["extra_tail"],
        seed=case["seed"],
    )
    kv = with_queries(kv, queries)
    g = torch.Generator().manual_seed(case["seed"] + 1)
    query = torch.randn(case["batch"], heads * case["group"], queries, case["head_dim"], generator=g)
    sink = torch.randn(query.shape[1], generator=g) if case["sink_logits"] else None
    mask = None
    if case["padded"] and kv.length > queries:
        mask = torch.ones(case["batch"], 1, queries, kv.length, dtype=torch.bool).tril(kv.length - queries)
        mask[0, :, :, : (kv.length - queries) // 2] = False
    out = backend(CPU).attend(query, kv, scaling=0.125, mask=mask, softcap=case["softcap"], sink_logits=sink)
    expected = reference(query, kv, mask, case["softcap"], sink)
    assert out.shape == expected.shape
    assert float((out - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("case", range(CASES))
def test_codebooks_are_read_in_place(case: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for queries in (1, 3):
        kv = with_queries(make([((0, 1), *codebook_formats(case, head_dim))], head_dim=head_dim, sinks=2), queries)
        query = torch.randn(1, 6, queries, head_dim, generator=torch.Generator().manual_seed(case))
        expected = reference(query, kv, None, None, None)
        with monkeypatch.context() as patch:
            patch.delattr("kvloom.kernels._torch.TorchBackend.decode")
            outputs = [each.attend(query, kv, scaling=0.125) for each in (backend(CPU), TORCH)]
        for out in outputs:
            assert float((out - expected).norm() / expected.norm()) < 2e-5


def test_heads_of_different_formats() -> None:
    k4, k2, v2 = Format(4, "per_channel", 64), Format(2, "per_channel", 32), Format(2, "per_token", 64)
    for queries in (1, 3, 40):
        kv = with_queries(make([((0, 2), k4, v2), ((1,), k2, v2)], pages=3, tail=50), queries)
        query = torch.randn(1, 6, queries, 64)
        out = backend(CPU).attend(query, kv, scaling=0.125)
        expected = reference(query, kv, None, None, None)
        assert float((out - expected).norm() / expected.norm()) < 2e-5


def test_each_query_reads_its_own_pages() -> None:
    """Overlap: query i must read pages [0, visible[i]) packed and later slots from the tail, as many queries or few."""
    fmt = Format(2, "per_channel", 64), Format(2, "per_token", 64)
    for queries in (3, 100):
        g = torch.Generator().manual_seed(1)
        tokens = 130
        k, v = torch.randn(2, 1, 1, tokens, 64, generator=g)
        layout = page_layout(*fmt, 64, 4)
        pages = HeadPages((0,), layout, backend(CPU).encode(k[:, :, :128], v[:, :, :128], layout))
        empty = ExactKV(k[:, :, :0], v[:, :, :0])
        visible = torch.tensor([(tokens - queries + i) // 64 for i in range(queries)])
        kv = PagedKV((pages,), empty, ExactKV(k, v), tokens, 64, 2, visible)
        query = torch.randn(1, 2, queries, 64, generator=g)
        out = backend(CPU).attend(query, kv, scaling=0.125)
        dk, dv = backend(CPU).decode(pages.data, layout, torch.float32)
        for i in range(queries):
            slot, packed = tokens - queries + i, int(visible[i]) * 64
            key = torch.cat([dk[:, :, :packed], k[:, :, packed : slot + 1]], 2).double()
            value = torch.cat([dv[:, :, :packed], v[:, :, packed : slot + 1]], 2).double()
            weights = torch.softmax(query[:, :, i : i + 1].double() @ key.transpose(-1, -2) * 0.125, -1)
            expected = (weights @ value)[:, :, 0]
            assert torch.allclose(out[:, i].double(), expected, atol=1e-5), i


def test_a_query_that_may_read_nothing_stays_finite() -> None:
    kv = with_queries(make([((0,), Format(4, "per_channel", 64), Format(4, "per_token", 64))]), 2)
    mask = torch.zeros(1, 1, 2, kv.length, dtype=torch.bool)
    out = backend(CPU).attend(torch.randn(1, 3, 2, 64), kv, scaling=0.125, mask=mask)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    kv = with_queries(make([((0,), Format(4, "per_channel", 64), Format(16, "per_token", 64))], dtype=dtype), 1)
    query = torch.randn(1, 4, 1, 64).to(dtype)
    out = backend(CPU).attend(query, kv, scaling=0.125)
    assert out.dtype == dtype
    expected = reference(query, kv, None, None, None)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert float((out.double() - expected).norm() / expected.norm()) < tolerance


def test_dense_attention_is_causal_and_capped() -> None:
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 20, 32, generator=g)
    query = torch.randn(1, 6, 7, 32, generator=g)
    plain = dense_attention(query, key, value, scaling=0.125)
    capped = dense_attention(query, key, value, scaling=0.125, softcap=1e6)
    assert torch.allclose(plain, capped, atol=1e-5)
    changed = value.clone()
    changed[:, :, -1] += 100  # only the last query may see the last token
    moved = dense_attention(query, key, changed, scaling=0.125)
    assert torch.equal(moved[:, :-1], plain[:, :-1])
    assert not torch.allclose(moved[:, -1], plain[:, -1])


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float64])
def test_dense_attention_takes_masks(queries: int, heads: int, kind: torch.dtype | None) -> None:
    g = torch.Generator().manual_seed(queries)
    key, value = torch.randn(2, 3, 2, 20, 32, generator=g, dtype=torch.float64)
    query = torch.randn(3, 6, queries, 32, generator=g, dtype=torch.float64)
    seen = torch.ones(queries, 20, dtype=torch.bool).tril(20 - queries).expand(3, heads, -1, -1)
    if kind is not None:
        seen = seen & (torch.rand(3, heads, queries, 20, generator=g) < 0.7)
        seen = seen | torch.eye(20, dtype=torch.bool)[-queries:]
    mask = {torch.bool: seen, torch.float64: torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)}
    out = dense_attention(query, key, value, scaling=0.125, mask=mask.get(kind))
    scores = query @ key.repeat_interleave(3, 1).transpose(-1, -2) * 0.125
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_extremes_of_fp16_decode_to_finite_numbers() -> None:
    fmt = Format(8, "per_channel", 64)
    layout = page_layout(fmt, Format(8, "per_token", 16), 16)
    key = torch.zeros(1, 1, 64, 16, dtype=torch.float16)
    key[0, 0, 0, 0], key[0, 0, 1, 0] = 65504, -1.5
    decoded, _ = backend(CPU).decode(backend(CPU).encode(key, key, layout), layout, torch.float16)
    assert bool(decoded.isfinite().all())


def test_a_handle_is_no_tensor() -> None:
    kv = make([((0,), Format(4, "per_channel", 64), Format(4, "per_token", 64))])
    with pytest.raises(ModelError, match="cat to its cached keys or values, which are packed"):
        torch.cat([kv, kv])

"""The tapped attention computes what the model's own attention computes, and splits packed from exact tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.errors import ModelError
from kvloom.plan import Window
from kvloom.signals._tap import TAP, Scoring, Tap, packed_end, packed_runs, tapped
from tests.signals.models import VOCABULARY, falcon, random_tokens, tiny

FAMILIES = ["llama", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss"]


def _loss(model, tokens, mask):
    """Some scalar, its logits at real positions, and its gradient by the embeddings."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    real = logits if mask is None else logits[mask.bool()]
    gradient = torch.autograd.grad(real.logsumexp(-1).square().sum(), embedded)[0]
    return real.detach(), gradient


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_equals_the_models_own_attention(family: str, padded: bool) -> None:
    model = tiny(family)
    model.set_attn_implementation("eager")
    tokens = random_tokens(2, 150)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[1, :40] = 0
    expected, expected_gradient = _loss(model, tokens, mask)
    with tapped(model, Tap(range(3), Window(sinks=3, recent=5), 64)):
        logits, gradient = _loss(model, tokens, mask)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


def _decoded_packed_ends(tokens: int, window: Window, page: int) -> list[int]:
    """What a cache that takes one token at a time has packed when each query comes, page by page."""
    ends, end = [], window.sinks
    for held in range(tokens):
        recent = window.recent
        while recent < window.recent_ratio * held:
            recent += 1
        while held - end - recent >= page:
            end += page
        ends.append(end)
    return ends


@given(
    st.integers(1, 300),
    st.sampled_from([16, 64]),
    st.integers(0, 40),
    st.one_of(st.integers(0, 90), st.sampled_from([0.1, 0.25, 0.5, 0.9])),
)
def test_packed_tokens_are_those_of_decoding(tokens: int, page: int, sinks: int, recent: int | float) -> None:
    keep = {"recent": recent} if isinstance(recent, int) else {"recent_ratio": recent}
    window = Window(sinks=sinks, **keep)
    expected = _decoded_packed_ends(tokens, window, page)
    assert [packed_end(query, window, page) for query in range(tokens)] == expected
    runs = packed_runs(tokens, window, page)
    assert [run.start for run in runs] + [tokens] == [0] + [run.stop for run in runs]
    assert [run.last for run in runs for _ in range(run.start, run.stop)] == expected
    assert all(run.first == sinks for run in runs)


def _slowly(query: Tensor, key: Tensor, value: Tensor, stored: tuple[Tensor, Tensor], ends: list[int], sinks: int):
    """Attention of one KV head and one query head, `[tokens, head_dim]` each, one query at a time."""
    rows = []
    for i, end in enumerate(ends):
        see = torch.arange(i + 1)
        packed = ((see >= sinks) & (see < end))[:, None]
        keys = torch.where(packed, stored[0][: i + 1], key[: i + 1])
        values = torch.where(packed, stored[1][: i + 1], value[: i + 1])
        rows.append((keys @ query[i] * 0.3).softmax(0) @ values)
    return torch.stack(rows)


def test_stored_tokens_are_seen_only_where_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, 3, 100, 16, generator=generator)
    key, value, new_key, new_value = (torch.randn(2, 2, 100, 16, generator=generator) for _ in range(4))
    window = Window(sinks=5, recent=7)
    tap = Tap({4}, window, 16, store=lambda layer, k, v: (new_key, new_value))
    output = tap.attend(4, query, key, value, Scoring(0.3, None, None, None))
    ends = _decoded_packed_ends(100, window, 16)
    for b, h, g in [(0, 0, 0), (0, 1, 2), (1, 1, 1)]:
        stored = new_key[b, h], new_value[b, h]
        expected = _slowly(query[b, h, g], key[b, h], value[b, h], stored, ends, window.sinks)
        torch.testing.assert_close(output[b, h, g], expected, atol=1e-5, rtol=1e-5)
    untapped = tap.attend(3, query, key, value, Scoring(0.3, None, None, None))
    assert not torch.allclose(untapped, output, atol=1e-3)


def test_a_query_that_may_look_nowhere_gets_nothing() -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., :2] = False
    ones = torch.ones(1, 1, 4, 16)
    tap = Tap(set(), Window(), 64)
    output = tap.attend(0, ones[:, :, None], ones, ones, Scoring(1.0, mask, None, None))
    assert output[0, 0, 0, :, 0].tolist() == [0, 0, 1, 1]


def test_the_implementation_is_restored_also_after_an_error() -> None:
    model = tiny("gemma3")
    model.set_attn_implementation("eager")
    with tapped(model, Tap(range(3), Window(), 64)):
        assert model.config._attn_implementation == TAP
    assert model.config._attn_implementation == "eager"
    with pytest.raises(IndexError), tapped(model, Tap(range(3), Window(), 64)):
        model(torch.tensor([[VOCABULARY]]))
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}


def test_the_tapped_attention_refuses_to_be_used_alone() -> None:
    model = tiny("llama")
    with tapped(model, Tap(range(3), Window(), 64)):
        pass
    model.set_attn_implementation(TAP)
    with pytest.raises(ModelError, match="attn_implementation"):
        model(random_tokens(1, 8))


def test_a_model_without_the_attention_interface_is_refused() -> None:
    with pytest.raises(ModelError, match="FalconForCausalLM does not use"), tapped(falcon(), Tap({0}, Window(), 64)):
        pass

"""Rings of sliding windows against transformers' own growing layer, pass by pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvloom.cache import LoomCache, loom_attention
from kvloom.cache._ring_kv import RingKV
from kvloom.cache._sliding import SlidingLayer
from kvloom.errors import CacheError
from tests.cache import tiny

BATCH, HEADS, DIM, ROOM = 2, 2, 16, 60
MODULE = SimpleNamespace(is_causal=True)


def states(tokens):
    return tuple(torch.randn(BATCH, HEADS, tokens, DIM, dtype=torch.float64) for _ in range(2))


def hidden_places(tokens, window, pads):
    """What sliding causal attention hides of ``ROOM`` places from the newest token: bool ``[batch, 1, 1, places]``."""
    place = torch.arange(ROOM)
    seen = (place < tokens) & (place >= tokens - window)
    return (seen & (place >= torch.tensor(pads)[:, None]))[:, None, None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_step_reads_what_the_growing_layer_reads(data):
    window = data.draw(st.integers(2, 40))  # with 1, the growing layer lets go of nothing
    passes = data.draw(st.lists(st.one_of(st.just(1), st.integers(1, 25)), min_size=1, max_size=20))
    pads = [data.draw(st.integers(0, passes[0] - 1)) for _ in range(BATCH)]
    softcap = data.draw(st.sampled_from([None, 2.0]))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    enabled = True
    ours = SlidingLayer(ROOM, window, lambda: enabled)
    theirs = DynamicSlidingWindowLayer(window)
    tokens = 0
    for new in passes:
        if tokens + new > ROOM:
            break
        enabled = data.draw(st.booleans())
        key, value = states(new)
        sizes = ours.get_mask_sizes(new)
        mine, other = ours.update(key, value), theirs.update(key, value)
        tokens += new
        assert int(ours.get_seq_length()) == tokens
        if not isinstance(mine[0], RingKV):
            assert new > 1 or not enabled
            assert all(a.equal(b) for a, b in zip(mine, other, strict=True))
            assert sizes == (mine[0].shape[2], tokens - mine[0].shape[2])
            continue
        assert sizes == (ROOM, 0)
        query = torch.randn(BATCH, 3 * HEADS, 1, DIM, dtype=torch.float64)
        shown = hidden_places(tokens, window, pads)
        held = other[0].shape[2]
        options = {"scaling": 0.3, "softcap": softcap}
        expected, _ = loom_attention(MODULE, query, *other, shown[..., tokens - held : tokens], **options)
        added = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, -1e9)
        for mask in (shown, added):
            actual, _ = loom_attention(MODULE, query, *mine, mask, **options)
            torch.testing.assert_close(actual, expected)
        unmasked, _ = loom_attention(MODULE, query, *other, None, **options)
        for mask in (None, shown[..., :0]):
            torch.testing.assert_close(loom_attention(MODULE, query, *mine, mask, **options)[0], unmasked)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_going_back(data):
    """Passes that are undone and tokens that are removed leave nothing behind; what is lost is said."""
    window = data.draw(st.integers(1, 12))
    layer, held = SlidingLayer(ROOM, window, lambda: True), torch.zeros(BATCH, HEADS, 0, DIM, dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(data.draw(st.integers(1, 12))):
        change = data.draw(st.sampled_from(["append", "undo", "crop"]))
        if change == "crop" and held.shape[2]:
            removed = data.draw(st.integers(0, min(3, held.shape[2])))
            try:
                layer.crop(-removed)
            except CacheError:
                assert removed
                continue
            held = held[:, :, : held.shape[2] - removed]
        elif change != "crop":
            key, _ = states(data.draw(st.integers(1, 5)))
            mark = layer.mark()
            layer.update(key, -key)
            if change == "undo":
                layer.roll_back(mark)
            else:
                held = torch.cat([held, key], dim=2)
        assert int(layer.get_seq_length()) == held.shape[2]
        mark, (key, _) = layer.mark(), states(2)
        before = held[:, :, max(0, held.shape[2] - window + 1) :]
        expected = torch.cat([before, key], dim=2)
        ours, theirs = layer.update(key, -key)
        layer.roll_back(mark)
        assert ours.equal(expected)
        assert theirs.equal(-expected)


def filled(window, tokens):
    layer = SlidingLayer(ROOM, window, lambda: True)
    layer.update(*states(tokens))
    return layer


def test_more_than_a_window_holds_is_not_taken_back():
    layer = filled(8, 9)
    with pytest.raises(CacheError, match="cannot crop 2 tokens: sliding windows of 8 tokens no longer hold"):
        layer.crop(-2)
    layer.crop(-1)
    layer.crop(0)
    with pytest.raises(CacheError, match="cannot crop 1 tokens: sliding"):
        layer.crop(-1)
    layer.reset()
    layer.update(*states(8))
    layer.crop(-8)
    with pytest.raises(CacheError, match="cannot crop 1 tokens from a cache of 0"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)


def test_what_cannot_be_taken_back_is_left_in_every_layer():
    model = tiny.enabled(tiny.build("gemma3"))
    cache = LoomCache(tiny.eight_bit(model), model, max_tokens=ROOM)
    tiny.run(model, cache, tiny.prompt(40), [40])
    with pytest.raises(CacheError, match="sliding windows of 24 tokens"):
        cache.crop(-3)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [40, 40, 40]
    cache.crop(-1)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [39, 39, 39]


def test_a_failed_pass_is_undone():
    model = tiny.exact("gemma3")
    plan = tiny.eight_bit(model)
    cache, twin = (LoomCache(plan, model, max_tokens=200) for _ in range(2))
    for each in (cache, twin):
        tiny.run(model, each, tiny.prompt(70), [66, 2, 1, 1])
    last = model.model.layers[2].self_attn.k_proj
    hook = last.register_forward_hook(lambda *args: args[-1].index_fill(1, torch.tensor([3]), float("nan")))
    with pytest.raises(CacheError, match="NaN"):
        tiny.run(model, cache, tiny.prompt(90, seed=8), [90])
    hook.remove()
    more = tiny.prompt(30, seed=4)
    assert tiny.run(model, cache, more, [27, 1, 2]).equal(tiny.run(model, twin, more, [27, 1, 2]))


def test_nothing_survives_a_reset():
    layer = filled(8, 20)
    layer.store.value.fill_(float("nan"))
    layer.reset()
    assert int(layer.get_seq_length()) == 0
    ring, _ = layer.update(*states(1))
    out, _ = loom_attention(MODULE, torch.randn(BATCH, HEADS, 1, DIM, dtype=torch.float64), ring, ring, None)
    assert out.isfinite().all()


def test_the_batch_is_reordered_where_it_lies_and_does_not_change():
    layer = filled(8, 20)
    before = layer.store.key.clone()
    at = layer.store.key.data_ptr()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.store.key.equal(before[[1, 0]])
    assert layer.store.key.data_ptr() == at
    assert layer.batch_size == BATCH
    with pytest.raises(CacheError, match="neither change its batch"):
        layer.batch_repeat_interleave(2)
    with pytest.raises(CacheError, match="assistant"):
        layer.activate_past_recording()


def test_what_is_filled_within_inference_mode_goes_on_without():
    layer, twin = (SlidingLayer(ROOM, 8, lambda: True) for _ in range(2))
    key, value = states(20)
    with torch.inference_mode():
        layer.update(key, value)
    twin.update(key, value)
    key, value = states(1)
    for ours, theirs in zip(layer.update(key, value), twin.update(key, value), strict=True):
        assert ours.key.equal(theirs.key)
        assert ours.value.equal(theirs.value)
    layer.reset()
    assert int(layer.get_seq_length()) == 0


def test_a_window_from_a_file_is_not_taken_back_beyond_what_the_file_has():
    """A growing layer writes one token less than a window."""
    layer = SlidingLayer(ROOM, 8, lambda: True)
    key, value = states(7)
    layer.restore({"keys": key, "values": value}, 30)
    assert int(layer.get_seq_length()) == 30
    with pytest.raises(CacheError, match="cannot crop 1 tokens: sliding"):
        layer.crop(-1)
    layer.update(*states(1))
    layer.crop(-1)
    key_more, value_more = states(2)
    assert layer.update(key_more, value_more)[0].equal(torch.cat([key, key_more], dim=2))

"""What must hold for every plan, batch, length and way of arriving, on random keys and values."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import tiny
import torch
from drawn import (
    EXAMPLES,
    FEWER,
    KV_HEADS,
    assert_bytes,
    assert_same,
    config_of,
    cuts,
    fill,
    new_cache,
    plans,
    states,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvloom import codecs
from kvloom.cache import LoomCache, loom_attention
from kvloom.errors import CacheError, ModelError
from kvloom.pages import PagedKV

# -- the slow reference -----------------------------------------------------------------------------------------------


def page_size(plan):
    entry = plan.layers[0]
    specs = [spec for head in range(KV_HEADS) for spec in entry.head(head)]
    return max([64, *(s.group_size for s in specs if s.grouping == "per_channel" and s.bits < 16)])


def pages_after(plan, tokens):
    """Full pages once ``tokens`` have been seen: what is left after sinks and recent tokens, in whole pages."""
    window = plan.layers[0].window
    keep = max(window.recent, math.ceil(window.recent_ratio * tokens))
    return max(0, tokens - min(tokens, window.sinks) - keep) // page_size(plan)


def rounded(x, spec, matrix):
    """Pages ``[batch, pages, tokens, head_dim]`` through the number format, and a calibrated rotation's matrix."""
    fmt = spec.format(x.shape[-1])
    if spec.rotation != "calibrated":
        return codecs.as_stored(x, fmt, x.shape[-2])
    stored = codecs.as_stored((x.double() @ matrix).float(), replace(fmt, rotation=None), x.shape[-2])
    return stored.double() @ matrix.inverse()


def as_stored(plan, key, value, pages):
    """Keys and values in float64 with the first ``pages`` pages rounded."""
    entry, size = plan.layers[0], page_size(plan)
    start = min(entry.window.sinks, key.shape[2])
    stop = start + pages * size
    key, value = key.double().clone(), value.double().clone()
    matrices = plan.rotations().get(0, {})
    for head in range(KV_HEADS):
        for side, x, spec in zip(("key", "value"), (key, value), entry.head(head), strict=True):
            whole = x[:, head, start:stop].unflatten(1, (-1, size))
            matrix = matrices[side][head].double() if side in matrices else None
            x[:, head, start:stop] = rounded(whole.float(), spec, matrix).double().flatten(1, 2)
    return key, value


def slow_attention(plan, query, key, value, chunks, padding):
    """Attention of the last chunk's queries, one query at a time; ``padding [batch]`` slots are left out."""
    start = key.shape[2] - chunks[-1]
    outputs = []
    for i in range(chunks[-1]):
        seen = start + i if plan.prefill == "quantized" else start
        k, v = as_stored(plan, key, value, pages_after(plan, seen))
        k, v = (x[:, :, : start + i + 1].repeat_interleave(2, dim=1) for x in (k, v))
        scores = (query[:, :, i : i + 1].double() @ k.transpose(-1, -2)) * 0.25
        hidden = torch.arange(start + i + 1) < padding[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        outputs.append(torch.softmax(scores, -1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


@EXAMPLES
@given(st.data())
def test_attention_reads_what_a_slow_reference_reads(data):
    plan, tokens, batch = data.draw(plans()), data.draw(st.integers(1, 300)), data.draw(st.integers(1, 2))
    last = min(tokens, data.draw(st.sampled_from([1, 2, 5, 40])))
    chunks = [*(data.draw(cuts(tokens - last)) if tokens > last else []), last]
    key, value = states(plan, tokens, batch=batch, seed=tokens)
    query = torch.randn(batch, 4, last, plan.model.head_dim, generator=torch.Generator().manual_seed(1)) * 0.2
    handle = fill(new_cache(plan), key, value, chunks)
    assert handle.shape == key.shape
    padding, mask = torch.zeros(batch, dtype=torch.long), None
    if data.draw(st.booleans()):
        padding = torch.tensor([data.draw(st.integers(0, tokens - last)) for _ in range(batch)])
        slots = torch.arange(tokens)
        mask = (slots <= slots[-last:, None])[None] & (slots >= padding[:, None])[:, None]
        mask = mask[:, None]
    output, weights = loom_attention(torch.nn.Module(), query, handle, handle, mask, scaling=0.25)
    assert weights is None
    expected = slow_attention(plan, query, key, value, chunks, padding)
    torch.testing.assert_close(output.double(), expected, atol=2e-4, rtol=1e-4)


# -- codes and bytes --------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data())
def test_codes_do_not_depend_on_how_tokens_arrive(data):
    plan, tokens = data.draw(plans()), data.draw(st.integers(1, 400))
    key, value = states(plan, tokens, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    once, pieces, singly = (new_cache(plan) for _ in range(3))
    fill(once, key, value, [tokens])
    fill(pieces, key, value, data.draw(cuts(tokens)))
    fill(singly, key, value, [1] * tokens)
    assert_same(once, pieces)
    assert_same(once, singly)
    assert once.packed_layers[0].num_pages == pages_after(plan, tokens)


@EXAMPLES
@given(st.data())
def test_planned_live_and_saved_bytes_are_equal(tmp_path_factory, data):
    plan, tokens, batch = data.draw(plans()), data.draw(st.integers(1, 700)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    cache = new_cache(plan)
    fill(cache, *states(plan, tokens, batch=batch, dtype=dtype), data.draw(cuts(tokens)))
    path = tmp_path_factory.mktemp("cache") / "prefix.safetensors"
    cache.save(path)
    saved = sum(t.numel() * t.element_size() for t in load_file(path).values())
    assert plan.nbytes(batch, tokens, dtype) == cache.nbytes() == saved
    if batch == 1 or plan.tensors is None:  # matrices are shared by the sequences of a batch
        assert cache.true_bits() == pytest.approx(plan.true_bits(tokens, dtype))
    again = LoomCache.load(path, plan, config_of(plan.model.head_dim))
    assert_same(cache, again)
    assert again.nbytes() == saved


@FEWER
@given(st.data())
def test_what_is_cached_is_the_value_the_codec_gives(data):
    plan, tokens = data.draw(plans("exact")), data.draw(st.integers(60, 400))
    key, value = states(plan, tokens)
    cache = new_cache(plan)
    fill(cache, key, value, [tokens])
    cache.packed_layers[0].is_enabled = lambda: False
    with pytest.warns(UserWarning, match="unpacks"):
        dense_key, dense_value = cache.update(key[:, :, :1], value[:, :, :1], 0)
    expected = as_stored(plan, key, value, pages_after(plan, tokens))
    torch.testing.assert_close(dense_key[:, :, :-1].double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense_value[:, :, :-1].double(), expected[1], atol=1e-5, rtol=1e-5)


# -- going back -------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data())
def test_crop_and_refill(data):
    """Cropped tokens might never have been, where what was packed is still to be packed."""
    plan, tokens = data.draw(plans()), data.draw(st.integers(2, 400))
    remove = data.draw(st.integers(1, tokens))
    key, value = states(plan, tokens)
    cache, fresh = new_cache(plan), new_cache(plan)
    fill(cache, key, value, [tokens])
    packed = cache.packed_layers[0].num_pages
    cache.crop(-remove)
    left = tokens - remove
    layer = cache.packed_layers[0]
    held = layer.sinks.tokens + layer.num_pages * layer.page_tokens + layer.tail.tokens
    assert held == cache.get_seq_length() == left
    assert layer.num_pages <= packed
    if left:
        fill(fresh, key[:, :, :left], value[:, :, :left], [left])
    if packed == pages_after(plan, left):
        if left:
            assert_same(cache, fresh)
        assert_bytes(cache, 1, torch.float32)
    key, value = states(plan, tokens, seed=5)
    fill(cache, key, value, data.draw(cuts(tokens)))
    fill(fresh, key, value, [tokens])
    assert_bytes(cache, 1, torch.float32)
    if packed == pages_after(plan, left):
        assert_same(cache, fresh)


@FEWER
@given(st.data())
def test_tokens_of_a_reopened_page_are_as_decoded(data):
    plan, tokens = data.draw(plans()), 600
    key, value = states(plan, tokens)
    cache = new_cache(plan)
    fill(cache, key, value, [tokens])
    layer = cache.packed_layers[0]
    stored = as_stored(plan, key, value, layer.num_pages)
    remove = layer.tail.tokens + data.draw(st.integers(1, layer.page_tokens))
    cache.crop(-remove)
    tail = slice(layer.length - layer.tail.tokens, layer.length)
    for reopened, expected in zip(layer._restored(layer.tail.key, layer.tail.value), stored, strict=True):
        torch.testing.assert_close(reopened.double(), expected[:, :, tail], atol=1e-5, rtol=1e-5)


@FEWER
@given(st.data())
def test_recording_keeps_rejected_tokens_out_of_the_pages(data):
    """Speculation that rejects tokens ends where plain decoding of the accepted ones does, and reads the same."""
    plan = data.draw(plans())
    cache, plain = new_cache(plan), new_cache(plan)
    cache.activate_past_recording()
    plain_tokens = 0
    for step in range(data.draw(st.integers(1, 12))):
        drafted = data.draw(st.integers(1, 90))
        accepted = data.draw(st.integers(1, drafted))
        key, value = states(plan, drafted, seed=step)
        handle, _ = cache.update(key, value, 0)
        twin = copy.deepcopy(plain)
        (expected, _), visible = twin.update(key, value, 0), handle.visible
        assert visible.equal(expected.visible)
        cache.crop(accepted - drafted)
        fill(plain, key[:, :, :accepted], value[:, :, :accepted], [accepted])
        plain_tokens += accepted
        assert_same(cache, plain)
        assert cache.get_seq_length() == plain_tokens
        assert_bytes(cache, 1, torch.float32)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_recorded_attention_is_the_plain_attention(prefill):
    plan = tiny.mixed(config_of(16), prefill=prefill)
    key, value = states(plan, 300)
    query = torch.randn(1, 4, 150, 16)
    outputs = []
    for record in (False, True):
        cache = new_cache(plan)
        if record:
            cache.activate_past_recording()
        fill(cache, key[:, :, :150], value[:, :, :150], [150])
        handle = fill(cache, key[:, :, 150:], value[:, :, 150:], [150])
        outputs.append(loom_attention(torch.nn.Module(), query, handle, handle, None, scaling=0.25)[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-6, rtol=0)


def test_recorded_tokens_are_packed_by_the_next_pass_too():
    """Nobody has to call crop: a cache left recording must not grow dense."""
    plan = tiny.eight_bit(config_of(16))
    cache = new_cache(plan)
    cache.activate_past_recording()
    key, value = states(plan, 200)
    fill(cache, key, value, [130, 70])
    assert cache.packed_layers[0].num_pages == 2
    cache.crop(0)
    assert cache.packed_layers[0].num_pages == 3
    assert_bytes(cache, 1, torch.float32)


def test_crop_arguments():
    plan = tiny.eight_bit(config_of(16))
    cache = new_cache(plan)
    cache.crop(-3)
    fill(cache, *states(plan, 100), [100])
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(50)
    with pytest.raises(CacheError, match="cannot crop 101 tokens from a cache of 100"):
        cache.crop(-101)
    assert cache.get_seq_length() == 100
    cache.crop(0)
    cache.crop(torch.tensor(-40))  # what transformers 5.17 passes
    assert isinstance(cache.get_seq_length(), int)
    cache.crop(-60)
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


# -- batches ----------------------------------------------------------------------------------------------------------


@FEWER
@given(st.data())
def test_batch_changes_act_on_every_sequence(data):
    plan, tokens = data.draw(plans()), data.draw(st.integers(1, 300))
    key, value = states(plan, tokens, batch=3)
    indices = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    selected, reordered, repeated, direct = (new_cache(plan) for _ in range(4))
    for cache in (selected, reordered):
        fill(cache, key, value, [tokens])
    selected.batch_select_indices(indices)
    reordered.reorder_cache(indices)
    fill(direct, key[indices], value[indices], [tokens])
    assert_same(selected, direct)
    assert_same(reordered, direct)
    fill(repeated, key[:1], value[:1], [tokens])
    repeated.batch_repeat_interleave(2)
    assert repeated.packed_layers[0].batch_size == 2
    assert_bytes(repeated, 2, torch.float32)
    assert_bytes(direct, len(indices), torch.float32)


def test_a_fresh_cache_answers_before_its_first_token():
    cache = new_cache(tiny.mixed(config_of(16)))
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert cache.get_max_length() == -1
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-1)
    cache.reset()
    with pytest.raises(CacheError, match="at least one token"):
        cache.true_bits()


def test_the_handle_stands_for_a_tensor():
    plan = tiny.mixed(config_of(16))
    handle = fill(new_cache(plan), *states(plan, 200, batch=2), [150, 50])
    assert isinstance(handle, PagedKV)
    assert handle.shape == (2, KV_HEADS, 200, 16)
    assert handle.dtype == torch.float32


@pytest.mark.parametrize("room", [{}, {"max_tokens": 250}])
def test_a_model_that_computes_with_the_handle_is_told_so(room):
    plan = tiny.mixed(config_of(16))
    handle = fill(new_cache(plan, **room), *states(plan, 200), [199, 1])
    for use in (lambda: handle.transpose(1, 2), lambda: torch.cat([handle]), lambda: handle.repeat(1, 2, 1, 1)):
        with pytest.raises(ModelError, match="which are packed"):
            use()
    assert not hasattr(handle, "no_name_of_a_tensor")
    copy.deepcopy(handle)

"""A cache of fixed size holds, and lets queries read, what the growing cache does."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from drawn import EXAMPLES, FEWER, assert_same, config_of, cuts, fill, new_cache, plans, states
from hypothesis import given
from hypothesis import strategies as st
from transformers import CompileConfig

from kvloom import kernels
from kvloom.cache import LoomCache, fixed_nbytes, loom_attention
from kvloom.cache._fixed import ring_tokens
from kvloom.cache._static import StaticLoomLayer
from kvloom.errors import CacheError
from kvloom.pages import ExactKV, HeadPages, StaticKV
from kvloom.plan import Window, full_pages
from kvloom.signals import calibrate_rotations

TOKENS = 320


def attended(cache, query, key, value, mask=None):
    handle, _ = cache.update(key, value, 0)
    return loom_attention(torch.nn.Module(), query, handle, handle, mask, scaling=0.25)[0]


@EXAMPLES
@given(st.data())
def test_it_holds_and_shows_what_the_growing_cache_does(data):
    plan, batch = data.draw(plans()), data.draw(st.integers(1, 2))
    chunks = data.draw(cuts(data.draw(st.integers(1, 200)))) + [1] * data.draw(st.integers(0, 80))
    tokens = sum(chunks)
    growing, static = new_cache(plan), new_cache(plan, max_tokens=data.draw(st.integers(tokens, TOKENS)))
    key, value = states(plan, tokens, batch=batch)
    query = torch.randn(batch, 4, tokens, plan.model.head_dim)
    start = 0
    for n in chunks:
        part = slice(start, start + n)
        expected, output = (
            attended(cache, query[:, :, part], key[:, :, part], value[:, :, part]) for cache in (growing, static)
        )
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        start += n
    assert_same(growing, static)
    static.check()


@EXAMPLES
@given(st.data())
def test_crop_save_and_fill_again(tmp_path_factory, data):
    plan, tokens = data.draw(plans()), data.draw(st.integers(2, 250))
    remove = data.draw(st.integers(1, tokens - 1))
    static, fresh = new_cache(plan, max_tokens=TOKENS), new_cache(plan)
    key, value = states(plan, tokens)
    fill(static, key, value, data.draw(cuts(tokens)))
    static.crop(-remove)
    path = tmp_path_factory.mktemp("cache") / "prefix.safetensors"
    static.save(path)
    again = LoomCache.load(path, plan, config_of(plan.model.head_dim), max_tokens=TOKENS)
    assert_same(static, again)
    left = tokens - remove
    layer, window = again.packed_layers[0], plan.layers[0].window
    assert layer.num_pages == full_pages(window, left, layer.page_tokens)
    if full_pages(window, tokens, layer.page_tokens) == layer.num_pages:
        fill(fresh, key[:, :, :left], value[:, :, :left], [left])
        fill(fresh, key[:, :, left:], value[:, :, left:], [remove])
        fill(again, key[:, :, left:], value[:, :, left:], [1] * remove)
        assert_same(again, fresh)


@FEWER
@given(st.data())
def test_the_ring_has_room_for_every_length(data):
    recent = data.draw(st.integers(0, 300))
    window = data.draw(
        st.sampled_from([Window(recent=recent, sinks=3), Window(recent_ratio=recent / 301), Window(sinks=recent)])
    )
    page, most = data.draw(st.sampled_from([64, 128])), data.draw(st.integers(1, 2000))
    ring = ring_tokens(window, most, page)
    exact = (n + 1 - min(n + 1, window.sinks) - full_pages(window, n, page) * page for n in range(most))
    assert max(exact) <= ring
    assert ring % page == 0
    assert ring <= max(recent, window.recent_ratio * most) + 2 * page


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_generate_gives_the_same_tokens(family, prefill):
    """In float64: rings of sliding windows are summed in another order."""
    model = tiny.exact(family)
    plan = tiny.mixed(model, window=Window(sinks=3, recent=20), prefill=prefill)
    ids = tiny.prompt(150, batch=2)
    growing, static = LoomCache(plan, model), LoomCache(plan, model, max_tokens=230)
    expected = tiny.greedy(model, ids, growing, new=80)
    assert torch.equal(tiny.greedy(model, ids, static, new=80), expected)
    for ours, theirs in zip(static.packed_layers.values(), growing.packed_layers.values(), strict=True):
        for (name, tensor), (other, same) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert name == other
            torch.testing.assert_close(tensor, same, atol=0 if tensor.dtype == torch.uint8 else 1e-9, rtol=0)


def test_left_padding_beams_and_a_second_turn():
    model = tiny.enabled(tiny.build("llama"))
    plan = tiny.eight_bit(model)
    ids, mask = tiny.prompt(150, batch=2), torch.ones(2, 150, dtype=torch.long)
    mask[1, :40] = 0
    for options in ({"attention_mask": mask}, {"num_beams": 2}):
        outs = [
            tiny.greedy(model, ids, LoomCache(plan, model, max_tokens=most), new=40, **options) for most in (None, 300)
        ]
        assert torch.equal(*outs)
    outs = []
    for most in (None, 300):
        cache = LoomCache(plan, model, max_tokens=most)
        first = tiny.greedy(model, ids, cache, new=20)
        turn = torch.cat([first, tiny.prompt(30, batch=2, seed=4)], dim=1)
        outs.append(tiny.greedy(model, turn, cache, new=20))
    assert torch.equal(*outs)


def compiled(model, ids, cache, monkeypatch):
    monkeypatch.setattr(type(kernels.backend(torch.device("cpu"))), "is_graph_safe", lambda *_: True)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode="default")
    config._compile_all_devices = True
    return tiny.greedy(model, ids, cache(), new=20, compile_config=config)


@pytest.mark.parametrize(
    ("family", "rotation"), [("llama", "hadamard"), ("llama", "calibrated"), ("gemma3", "hadamard")]
)
def test_generate_compiles_one_whole_graph_for_all_steps_and_caches(monkeypatch, family, rotation):
    model = tiny.exact(family)
    plan = tiny.mixed(model)
    if rotation == "calibrated":
        plan = calibrate_rotations(model, plan, tiny.prompt(100))
    ids = tiny.prompt(120, batch=2)
    expected = tiny.greedy(model, ids, LoomCache(plan, model), new=20)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        out = compiled(model, ids, lambda: LoomCache(plan, model, max_tokens=160), monkeypatch)
        assert torch.equal(out, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_full_cache_is_one_sentence_and_loses_nothing(monkeypatch, compile_it):
    model = tiny.enabled(tiny.build("llama"))
    cache = LoomCache(tiny.mixed(model), model, max_tokens=130)
    ids = tiny.prompt(120)
    generate = compiled if compile_it else lambda m, i, c, _: tiny.greedy(m, i, c(), new=20)
    with pytest.raises(CacheError, match="room for 130 tokens and is asked to hold 131"):
        generate(model, ids, lambda: cache, monkeypatch)
    assert int(cache.get_seq_length()) == 130
    cache.check()
    with pytest.raises(CacheError, match="room for 130 tokens and is asked to hold 170"):
        model(tiny.prompt(40), past_key_values=cache)
    assert int(cache.get_seq_length()) == 130


def test_a_token_beyond_the_end_is_noticed_late_but_noticed():
    plan = tiny.mixed(config_of(16))
    cache = new_cache(plan, max_tokens=70)
    key, value = states(plan, 72)
    fill(cache, key, value, [70, 1, 1])
    assert int(cache.get_seq_length()) == 70
    with pytest.raises(CacheError, match="asked to hold 71"):
        cache.check()


@torch.no_grad()
def test_a_bad_value_undoes_the_pass_in_every_layer():
    model = tiny.enabled(tiny.build("gemma3"))
    cache = LoomCache(tiny.mixed(model), model, max_tokens=300)
    model(tiny.prompt(100), past_key_values=cache)
    before = [copy.deepcopy(list(layer.tensors())) for layer in cache.packed_layers.values()]
    model.model.layers[2].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(CacheError, match="NaN"):
        model(tiny.prompt(100), past_key_values=cache)
    for layer, held in zip(cache.packed_layers.values(), before, strict=True):
        for (_, tensor), (_, same) in zip(layer.tensors(), held, strict=True):
            assert tensor.equal(same)


def test_what_cannot_be_allocated_is_raised_as_it_is(monkeypatch):
    model, tokens = tiny.enabled(tiny.build("llama")), tiny.prompt(80)
    cache = LoomCache(tiny.mixed(model), model, max_tokens=100)
    with monkeypatch.context() as patch:
        patch.setattr(StaticLoomLayer, "_exact", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            tiny.run(model, cache, tiny.prompt(80, batch=3), [80])
    assert (cache.get_seq_length(), cache.nbytes()) == (0, 0)
    expected = tiny.run(model, LoomCache(tiny.mixed(model), model), tokens, [80])
    torch.testing.assert_close(tiny.run(model, cache, tokens, [80]), expected)


def no_memory(*_):
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("room", [{}, {"max_tokens": TOKENS}])
def test_what_is_filled_within_inference_mode_goes_on_without(room):
    model, tokens = tiny.enabled(tiny.build("llama")), tiny.prompt(140)
    plan = tiny.mixed(model)
    expected = tiny.run(model, LoomCache(plan, model, **room), tokens, tiny.steps(140, 100))
    cache = LoomCache(plan, model, **room)
    with torch.inference_mode():
        first = model(tokens[:, :100], past_key_values=cache).logits
    rest = tiny.run(model, cache, tokens[:, 100:], [1] * 40)
    assert torch.cat([first, rest], dim=1).equal(expected)
    cache.reset()
    assert tiny.run(model, cache, tokens, tiny.steps(140, 100)).equal(expected)


def test_a_model_that_its_user_compiled_allocates():
    model, tokens = tiny.enabled(tiny.build("llama", num_hidden_layers=1)), tiny.prompt(70)
    expected = tiny.run(model, LoomCache(tiny.mixed(model), model, max_tokens=80), tokens, tiny.steps(70, 68))
    cache = LoomCache(tiny.mixed(model), model, max_tokens=80)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(tiny.run(compiled, cache, tokens, tiny.steps(70, 68)), expected)


def test_bytes_are_those_of_the_capacity():
    plan = tiny.mixed(config_of(16), window=Window(sinks=4, recent=32))
    cache = new_cache(plan, max_tokens=1000)
    fill(cache, *states(plan, 10, batch=3), [10])
    layer = cache.packed_layers[0]
    pages = full_pages(layer.entry.window, 1000, layer.page_tokens)
    records = sum(g.layout.nbytes * len(g.heads) for g in layer.store.pages)
    exact = (4 + ring_tokens(layer.entry.window, 1000, layer.page_tokens)) * 2 * 2 * 16 * 4
    assert cache.nbytes() == 3 * (pages * records + exact) + layer.store.state.numel() * 4
    assert cache.nbytes() < plan.nbytes(3, 1000, torch.float32) + 3 * 2 * 64 * 2 * 2 * 16 * 4


@EXAMPLES
@given(st.data())
def test_bytes_are_known_before(data):
    plan, batch = data.draw(plans()), data.draw(st.integers(1, 3))
    most = data.draw(st.integers(1, TOKENS))
    tokens, dtype = data.draw(st.integers(1, most)), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cache = new_cache(plan, max_tokens=most)
    key, value = states(plan, tokens, batch=batch, dtype=dtype)
    fill(cache, key, value, [tokens])
    assert cache.nbytes() == fixed_nbytes(plan, batch, most, dtype)


def test_reset_keeps_the_storage():
    plan = tiny.mixed(config_of(16))
    cache = new_cache(plan, max_tokens=200)
    key, value = states(plan, 150)
    fill(cache, key, value, [150])
    at = cache.packed_layers[0].store.pages[0].data.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = new_cache(plan)
    fill(cache, key, value, [100, 50])
    fill(fresh, key, value, [150])
    assert_same(cache, fresh)
    assert cache.packed_layers[0].store.pages[0].data.data_ptr() == at


def test_what_it_cannot_do_is_said():
    plan = tiny.mixed(config_of(16))
    with pytest.raises(CacheError, match="max_tokens is 0"):
        new_cache(plan, max_tokens=0)
    with pytest.raises(CacheError, match="cannot clamp"):
        new_cache(plan, max_tokens=10, nonfinite="clamp")
    cache = new_cache(plan, max_tokens=100)
    fill(cache, *states(plan, 80), [80])
    with pytest.raises(CacheError, match="change its batch"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(CacheError, match="assistant"):
        cache.activate_past_recording()


def test_sequences_of_different_lengths_and_a_page_table():
    """What serving needs of `StaticKV`: each sequence is as one of its own, wherever its pages lie."""
    plan = tiny.mixed(config_of(16), window=Window(sinks=3))
    lengths, backend = [40, 130, 200], kernels.backend(torch.device("cpu"))
    alone = [new_cache(plan, max_tokens=256) for _ in lengths]
    key, value = states(plan, 210, batch=3)
    for b, (cache, n) in enumerate(zip(alone, lengths, strict=True)):
        fill(cache, key[b : b + 1, :, :n], value[b : b + 1, :, :n], [n])
    stores = [cache.packed_layers[0].store for cache in alone]
    table = torch.randperm(3 * stores[0].num_pages, generator=torch.Generator().manual_seed(0)).view(3, -1).int()
    together = paged_together(stores, table)
    query = torch.randn(3, 4, 10, 16)
    for step in range(10):
        now = [torch.stack([x[b, :, n + step : n + step + 1] for b, n in enumerate(lengths)]) for x in (key, value)]
        backend.append(*now, together)
        output = backend.attend_static(query[:, :, step : step + 1], together, scaling=0.25)
        for b, store in enumerate(stores):
            backend.append(*(x[b : b + 1] for x in now), store)
            expected = backend.attend_static(query[b : b + 1, :, step : step + 1], store, scaling=0.25)
            torch.testing.assert_close(output[b : b + 1], expected)
    assert together.levels()[:, 0].tolist() == [n + 10 for n in lengths]


def paged_together(stores, table):
    """Caches of one sequence as one, their pages scattered over a pool."""
    first = stores[0]
    pages = []
    for g, group in enumerate(first.pages):
        pool = group.data.new_zeros(1, len(group.heads), table.numel(), group.layout.nbytes)
        for b, store in enumerate(stores):
            pool[0][:, table[b].long()] = store.pages[g].data[0]
        pages.append(HeadPages(group.heads, group.layout, pool))
    sinks, tail = (
        ExactKV(*(torch.cat([getattr(getattr(s, part), side) for s in stores]) for side in ("key", "value")))
        for part in ("sinks", "tail")
    )
    levels = torch.cat([s.levels().flatten() for s in stores])
    state = torch.cat([levels, levels.new_zeros(64)])
    turns = {"query_turn": first.query_turn, "output_turn": first.output_turn}
    return StaticKV(tuple(pages), sinks, tail, state, first.flags, first.filled, first.page_tokens, table, **turns)

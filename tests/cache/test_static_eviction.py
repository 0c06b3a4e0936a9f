"""Eviction in a cache of fixed size: it holds, and lets queries read, what the growing cache does."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from drawn import EXAMPLES, FEWER, assert_same, config_of, new_cache, plans
from evicting import AT_PROMPTS_END, evicting, feed, stream, two_turns
from hypothesis import given
from hypothesis import strategies as st
from test_static_cache import compiled

from kvloom.cache import LoomCache, fixed_nbytes
from kvloom.errors import CacheError, PlanError
from kvloom.plan import Fingerprint, Plan, TensorSpec, Window

EIGHT = TensorSpec(bits=8, grouping="per_channel")


def plan_of(policy="snapkv", budget=150, **parameters):
    plan = Plan.from_specs(Fingerprint.of(config_of(16)), {0: (EIGHT, EIGHT)}, window=Window(sinks=4))
    return evicting(plan, policy, budget, **once(policy), **parameters)


def once(policy):
    return {"decode": False} if policy == "streaming_llm" else {}


@st.composite
def plans_that_fit(draw):
    """A drawn plan of one layer without keys before RoPE, that evicts when a prompt ends."""
    plan = draw(plans(prefill="exact").filter(lambda plan: not plan.pre_rope_layers))
    policy = draw(st.sampled_from(AT_PROMPTS_END))
    return evicting(plan, policy, draw(st.sampled_from([0.1, 0.4, 0.7, 120])), **once(policy))


@EXAMPLES
@given(st.data())
def test_it_holds_and_shows_what_the_growing_cache_does(data):
    growing, static, tokens, turns = data.draw(two_turns(data.draw(plans_that_fit())))
    for start, turn, steps in turns:
        ours, theirs = (feed(cache, tokens, [turn] + [1] * steps, start) for cache in (static, growing))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert int(static.get_seq_length()) == start + turn + steps
    assert_same(static, growing)
    static.check()


@pytest.mark.parametrize("policy", ["snapkv", "adakv"])
def test_a_page_that_has_just_been_filled_is_a_page(policy):
    plan = plan_of(policy, 150)
    for last in range(64):
        growing, static = new_cache(plan), new_cache(plan, max_tokens=600)
        for cache in (growing, static):
            feed(cache, stream(plan, 400), [200] + [1] * last)
        assert_same(static, growing)
        for cache in (growing, static):
            feed(cache, stream(plan, 400), [90], 200 + last)
        assert_same(static, growing)


@EXAMPLES
@given(st.data())
def test_bytes_are_known_before(data):
    plan, batch = data.draw(plans_that_fit()), data.draw(st.integers(1, 3))
    prompt = data.draw(st.integers(1, 500))
    most = prompt + data.draw(st.integers(0, 200))
    cache = new_cache(plan, max_tokens=most)
    feed(cache, stream(plan, prompt, batch=batch), [prompt])
    assert cache.nbytes() == fixed_nbytes(plan, batch, most, torch.float32, prompt=prompt)


def test_bytes_are_those_of_what_is_kept():
    """Within the ring's pages, the state, and the numbers of pages by token, of what the growing cache takes."""
    plan = plan_of("adakv", 0.25)
    fixed, grown = fixed_nbytes(plan, 2, 4096, "float16", prompt=4000), plan.nbytes(2, 4096, "float16", decoded=96)
    assert grown < fixed < grown + 2 * 2 * (128 * 2 * 16 * 2 + 256 * 2) + 2000
    assert fixed < fixed_nbytes(plan.model_copy(update={"layers": unkept(plan)}), 2, 4096, "float16") / 2
    for prompt in (None, 0, 5000):
        with pytest.raises(PlanError, match="give prompt, 1 to 4096 tokens"):
            fixed_nbytes(plan, 2, 4096, prompt=prompt)


def unkept(plan):
    return tuple(entry.model_copy(update={"evict": None}) for entry in plan.layers)


@FEWER
@given(st.data())
def test_a_prompt_in_pieces_and_a_file(tmp_path_factory, data):
    plan, tokens = data.draw(plans_that_fit()), data.draw(st.integers(3, 300))
    parts = stream(plan, tokens + 20)
    once, pieces = (new_cache(plan, max_tokens=400) for _ in range(2))
    feed(once, parts, [tokens])
    pieces.expect_prompt(tokens)
    feed(pieces, parts, [tokens - 2, 1, 1])
    feed(pieces, parts, [1] * 20, tokens)
    feed(once, parts, [1] * 20, tokens)
    assert_same(once, pieces)
    path = tmp_path_factory.mktemp("cache") / "prefix.safetensors"
    pieces.save(path)
    for most in (None, 600):
        assert_same(LoomCache.load(path, plan, config_of(plan.model.head_dim), max_tokens=most), once)


@pytest.mark.parametrize("policy", AT_PROMPTS_END)
def test_generate_gives_the_same_tokens(policy):
    model = tiny.enabled(tiny.build("llama"))
    plan = evicting(tiny.mixed(model, window=Window(sinks=4, recent=20)), policy, 130, **once(policy))
    ids, mask = tiny.prompt(300, batch=2), torch.ones(2, 300, dtype=torch.long)
    mask[1, :200] = 0  # fewer real tokens than are kept
    for options in ({}, {"attention_mask": mask}, {"num_beams": 2}):
        outs = [
            tiny.greedy(model, ids, LoomCache(plan, model, max_tokens=most), new=40, **options) for most in (None, 400)
        ]
        assert torch.equal(*outs)


def test_a_second_turn_and_a_second_prompt():
    model = tiny.enabled(tiny.build("gemma3"))
    plan = evicting(tiny.mixed(model, window=Window(sinks=4)), "adakv", 130)
    static = LoomCache(plan, model, max_tokens=500)
    for first_tokens in (300, 310, 200):  # fits in the storage of the first; does not
        growing, outs = LoomCache(plan, model), []
        for cache in (growing, static):
            cache.reset()
            first = tiny.greedy(model, tiny.prompt(first_tokens, batch=2), cache, new=20)
            turn = torch.cat([first, tiny.prompt(100, batch=2, seed=4)], dim=1)
            outs.append(tiny.greedy(model, turn, cache, new=20))
        assert torch.equal(*outs)


@pytest.mark.parametrize("evicting_layer", ["0", "1"])
def test_layers_may_differ_and_a_prompt_may_end_in_one_token(evicting_layer):
    model = tiny.enabled(tiny.build("llama"))
    plan = tiny.eight_bit(model)
    entry = plan.layers[0]
    evicts = evicting(plan, "adakv", 100).layers[0]
    layers = [(evicts if n == evicting_layer else entry).model_copy(update={"layers": n}) for n in ("0", "1")]
    plan = Plan(model=plan.model, layers=tuple(layers))
    for prompt, chunk in ((301, 100), (1, None)):
        outs = []
        for most in (None, 400):
            cache = LoomCache(plan, model, max_tokens=most)
            cache.expect_prompt(prompt)
            ids = tiny.prompt(prompt, batch=2)
            outs.append(tiny.greedy(model, ids, cache, new=40, prefill_chunk_size=chunk))
        assert torch.equal(*outs)


def test_storage_stays_for_prompts_that_fit():
    plan = plan_of()
    cache, tokens = new_cache(plan, max_tokens=400), stream(plan, 400)
    feed(cache, tokens, [300] + [1] * 100)
    layer = cache.packed_layers[0]
    at = layer.store.pages[0].data.data_ptr()
    for prompt, same in ((350, True), (300, True), (200, False)):
        cache.reset()
        assert cache.get_seq_length() == 0
        feed(cache, tokens, [prompt] + [1] * (400 - prompt))
        fresh = new_cache(plan)
        feed(fresh, tokens, [prompt] + [1] * (400 - prompt))
        assert_same(cache, fresh)
        assert (layer.store.pages[0].data.data_ptr() == at) == same


def test_generate_compiles_one_whole_graph_for_all_prompts(monkeypatch):
    model = tiny.enabled(tiny.build("llama"))
    plan = evicting(tiny.mixed(model), "adakv", 100, window=5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = LoomCache(plan, model, max_tokens=260)
    for seed in (0, 1):
        ids = tiny.prompt(200, batch=2, seed=seed)
        expected = tiny.greedy(model, ids, LoomCache(plan, model), new=20)
        static.reset()
        assert torch.equal(compiled(model, ids, lambda: static, monkeypatch), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


STEPS = 59  # the next one fills a page


@torch.no_grad()
@pytest.mark.parametrize("count", [100, 1])
def test_a_bad_value_undoes_the_pass_in_every_layer(count):
    model = tiny.enabled(tiny.build("llama"))
    plan = evicting(tiny.mixed(model, window=Window(sinks=4)), "snapkv", 200, window=90)
    cache = LoomCache(plan, model, max_tokens=600)
    model(tiny.prompt(300), past_key_values=cache)
    for _ in range(STEPS):
        model(tiny.prompt(1), past_key_values=cache)
    before = [copy.deepcopy(list(layer.tensors())) for layer in cache.packed_layers.values()]
    weight = model.model.layers[1].self_attn.v_proj.weight
    held = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(CacheError, match="NaN"):
        model(tiny.prompt(count), past_key_values=cache)
    weight.copy_(held)
    for layer, contents in zip(cache.packed_layers.values(), before, strict=True):
        for (_, tensor), (_, same) in zip(layer.tensors(), contents, strict=True):
            assert tensor.equal(same)
    again = LoomCache(plan, model, max_tokens=600)
    model(tiny.prompt(300), past_key_values=again)
    for _ in range(STEPS):
        model(tiny.prompt(1), past_key_values=again)
    outs = [model(tiny.prompt(100), past_key_values=each).logits for each in (cache, again)]
    assert torch.equal(*outs)


def test_what_it_cannot_do_is_said():
    for policy in ("h2o", "streaming_llm"):
        plan = evicting(plan_of().model_copy(update={"layers": unkept(plan_of())}), policy, 200)
        with pytest.raises(CacheError, match=f"does not show policy '{policy}' its steps"):
            new_cache(plan, max_tokens=100)
    cache, tokens = new_cache(plan_of(), max_tokens=310), stream(plan_of(), 400)
    feed(cache, tokens, [300, *[1] * 10])
    with pytest.raises(CacheError, match="room for 310 tokens and is asked to hold 311"):
        cache.check(room_for=1)
    with pytest.raises(CacheError, match="asked to hold 350"):
        feed(cache, tokens, [40], 310)
    with pytest.raises(CacheError, match="change its batch"):
        cache.batch_repeat_interleave(2)
    assert int(cache.get_seq_length()) == 310

"""Every way `generate` uses a cache, against the dense cache or against the same plan used plainly."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from transformers import set_seed

from kvloom.cache import LoomCache
from kvloom.plan import Window

WINDOWS = {
    "none": Window(),
    "sinks": Window(sinks=4),
    "recent": Window(recent=32),
    "sinks and ratio": Window(sinks=4, recent_ratio=0.25),
}


@pytest.fixture(scope="module")
def plain():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def model():
    return tiny.enabled(tiny.build("llama"))


@pytest.fixture(scope="module")
def precise():
    """In float64, so that how a prompt is cut cannot flip a code."""
    return tiny.enabled(tiny.build("llama").double())


def same_as_dense(plain, model, prompt, plan=tiny.passthrough, **options):
    expected = tiny.greedy(plain, prompt, tiny.dense(plain), **options)
    actual = tiny.greedy(model, prompt, LoomCache(plan(model), model), **options)
    assert actual.equal(expected)


# -- decoding strategies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40, 63, 64, 127])
def test_greedy(plain, model, tokens):
    same_as_dense(plain, model, tiny.prompt(tokens), new=70)


def test_sampling(plain, model):
    prompt, options = tiny.prompt(60, batch=2), {"do_sample": True, "top_k": 0, "temperature": 1.3}
    set_seed(7)
    expected = tiny.greedy(plain, prompt, tiny.dense(plain), **options)
    set_seed(7)
    assert tiny.greedy(model, prompt, LoomCache(tiny.passthrough(model), model), **options).equal(expected)
    set_seed(8)
    assert not tiny.greedy(model, prompt, LoomCache(tiny.passthrough(model), model), **options).equal(expected)


def test_several_return_sequences(plain, model):
    prompt, options = tiny.prompt(60), {"do_sample": True, "num_return_sequences": 3}
    set_seed(7)
    expected = tiny.greedy(plain, prompt, tiny.dense(plain), **options)
    set_seed(7)
    cache = LoomCache(tiny.passthrough(model), model)
    assert tiny.greedy(model, prompt, cache, **options).equal(expected)
    assert cache.nbytes() == cache.plan.nbytes(3, cache.get_seq_length(), model.dtype)


def test_beams(plain, model):
    same_as_dense(plain, model, tiny.prompt(58, batch=2), num_beams=3, num_return_sequences=3)


def test_prefill_in_chunks(plain, model):
    same_as_dense(plain, model, tiny.prompt(150), prefill_chunk_size=47)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("plan", [tiny.passthrough, tiny.eight_bit])
def test_left_padding(model, plan, prefill):
    """Every row equals its own unpadded run: exactly in effect for passthrough, nearly at 8 bits (other groups)."""
    lengths, longest = (150, 100, 3), 150
    rows = [tiny.prompt(n, seed=n) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(row, (longest - n, 0)) for row, n in zip(rows, lengths, strict=True)])
    mask = torch.cat([(torch.arange(longest) >= longest - n).long()[None] for n in lengths])
    together = model.generate(
        batch,
        attention_mask=mask,
        past_key_values=LoomCache(plan(model, prefill=prefill), model),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for i, row in enumerate(rows):
        alone = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            past_key_values=LoomCache(plan(model, prefill=prefill), model),
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        first, expected = together.logits[0][i], alone.logits[0][0]
        if plan is tiny.passthrough:
            torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)
            assert together.sequences[i, longest:].equal(alone.sequences[0, lengths[i] :])
        else:
            assert (first - expected).std() < 0.05 * expected.std()


# -- speculative decoding ---------------------------------------------------------------------------------------------


def drafts(precise):
    """An assistant that is often, but not always, right."""
    assistant = copy.deepcopy(precise)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return assistant


@pytest.mark.parametrize("plan", [tiny.passthrough, tiny.mixed])
@pytest.mark.parametrize("tokens", [30, 100])
def test_assisted_decoding_gives_the_plain_tokens(precise, plan, tokens, monkeypatch):
    """Under prefill="quantized" whatever is verified together reads what it would have read one by one."""
    plan, prompt = plan(precise, prefill="quantized"), tiny.prompt(tokens)
    plain = LoomCache(plan, precise)
    expected = tiny.greedy(precise, prompt, plain, new=80)
    cache, rejected = LoomCache(plan, precise), []
    crop = cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (rejected.append(-count), crop(count)))
    actual = tiny.greedy(precise, prompt, cache, new=80, assistant_model=drafts(precise))
    assert actual.equal(expected)
    assert 0 in rejected
    assert max(rejected) > 0
    assert_same_contents(cache, plain, precise)


@pytest.mark.parametrize("plan", [tiny.passthrough, tiny.mixed])
def test_prompt_lookup_gives_the_plain_tokens(precise, plan):
    plan, prompt = plan(precise, prefill="quantized"), tiny.prompt(30).repeat(1, 4)
    plain = LoomCache(plan, precise)
    expected = tiny.greedy(precise, prompt, plain, new=80)
    cache = LoomCache(plan, precise)
    actual = tiny.greedy(precise, prompt, cache, new=80, prompt_lookup_num_tokens=5)
    assert actual.equal(expected)
    assert_same_contents(cache, plain, precise)


def assert_same_contents(cache, plain, model):
    """Same tokens seen, same codes (where rounding leaves no trace of the cuts), bytes by the plan."""
    assert cache.get_seq_length() == plain.get_seq_length()
    assert cache.nbytes() == plain.nbytes() == cache.plan.nbytes(1, cache.get_seq_length(), model.dtype)
    if cache.plan.layers[0].key.bits < 16:
        assert tiny.codes(cache)[0].shape[2] > 0
        assert all(a.equal(b) for a, b in zip(tiny.codes(cache), tiny.codes(plain), strict=True))


def test_assisted_decoding_with_an_exact_prefill(plain, model):
    """Passthrough loses nothing, so that speculation equals the dense cache in any prefill mode."""
    prompt = tiny.prompt(100)
    expected = tiny.greedy(plain, prompt, tiny.dense(plain), new=60)
    cache = LoomCache(tiny.passthrough(model), model)
    assert tiny.greedy(model, prompt, cache, new=60, assistant_model=drafts(model)).equal(expected)


def test_the_assistant_may_have_a_packed_cache_too(precise):
    """A cache that drafts, is cropped and drafts again keeps its length and bytes right."""
    plan = tiny.eight_bit(precise)
    cache = LoomCache(plan, precise)
    cache.activate_past_recording()
    tokens = tiny.prompt(200)
    tiny.run(precise, cache, tokens[:, :60], [60])
    for start in range(60, 180, 4):
        tiny.run(precise, cache, tokens[:, start : start + 6], [1] * 6)
        cache.crop(-2)
        assert cache.get_seq_length() == start + 4
        assert cache.nbytes() == plan.nbytes(1, start + 4, precise.dtype)


def test_plain_decoding_after_speculation(model, plain):
    """A cache used for speculation goes on packing when it is used plainly afterwards."""
    prompt = tiny.prompt(60)
    cache = LoomCache(tiny.passthrough(model), model)
    first = tiny.greedy(model, prompt, cache, new=20, prompt_lookup_num_tokens=4)
    second = tiny.greedy(model, torch.cat([first, tiny.prompt(90, seed=5)], 1), cache, new=20)
    reference = torch.cat([first, tiny.prompt(90, seed=5)], 1)
    assert second.equal(tiny.greedy(plain, reference, tiny.dense(plain), new=20))
    assert cache.packed_layers[0].num_pages == 2


# -- the cache between calls ------------------------------------------------------------------------------------------


def test_second_turn(plain, model):
    cache, first = LoomCache(tiny.passthrough(model), model), tiny.prompt(50)
    answer = tiny.greedy(model, first, cache, new=30)
    turn = torch.cat([answer, tiny.prompt(70, seed=9)], dim=1)
    expected = tiny.greedy(plain, turn, tiny.dense(plain), new=30)
    assert tiny.greedy(model, turn, cache, new=30).equal(expected)
    assert cache.nbytes() == cache.plan.nbytes(1, cache.get_seq_length(), model.dtype)


def test_second_turn_equals_one_run_under_a_quantized_prefill(precise):
    plan = tiny.mixed(precise, prefill="quantized")
    cache = LoomCache(plan, precise)
    turn = torch.cat([tiny.greedy(precise, tiny.prompt(50), cache, new=30), tiny.prompt(70, seed=9)], dim=1)
    once = tiny.greedy(precise, turn, LoomCache(plan, precise), new=30)
    assert tiny.greedy(precise, turn, cache, new=30).equal(once)


def test_deepcopy_is_independent(model):
    cache = LoomCache(tiny.mixed(model), model)
    tiny.run(model, cache, tiny.prompt(130), [130])
    twin = copy.deepcopy(cache)
    before = [tensor.clone() for layer in cache.packed_layers.values() for _, tensor in layer.tensors()]
    forked = tiny.run(model, twin, tiny.prompt(70, seed=4), [66, 2, 1, 1])
    after = [tensor for layer in cache.packed_layers.values() for _, tensor in layer.tensors()]
    assert cache.get_seq_length() == 130
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    assert tiny.run(model, cache, tiny.prompt(70, seed=4), [66, 2, 1, 1]).equal(forked)


def test_reset_makes_the_cache_new(model):
    cache = LoomCache(tiny.mixed(model, window=Window(sinks=4)), model)
    first = tiny.greedy(model, tiny.prompt(130), cache, new=10)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    assert tiny.greedy(model, tiny.prompt(130), cache, new=10).equal(first)


def test_reset_allows_another_batch_and_dtype(model, precise):
    cache = LoomCache(tiny.eight_bit(model), model)
    tiny.run(model, cache, tiny.prompt(70), [70])
    cache.reset()
    tiny.run(precise, cache, tiny.prompt(70, batch=2), [70])
    assert cache.nbytes() == cache.plan.nbytes(2, 70, torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
        lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers],
    ],
    ids=["repeat", "select", "reorder", "offload"],
)
def test_batch_changes_match_the_dense_cache(plain, model, change):
    tokens = tiny.prompt(132, batch=3)
    dense, packed = tiny.dense(plain), LoomCache(tiny.passthrough(model, window=Window(sinks=4)), model)
    for cache, runner in ((dense, plain), (packed, model)):
        tiny.run(runner, cache, tokens, [132])
        change(cache)
    batch = packed.batch_size
    more = tiny.prompt(5, batch=batch, seed=3)
    torch.testing.assert_close(
        tiny.run(model, packed, more, [3, 1, 1]), tiny.run(plain, dense, more, [3, 1, 1]), atol=1e-4, rtol=0
    )
    assert packed.nbytes() == packed.plan.nbytes(batch, 137, model.dtype)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129])
def test_lengths_around_a_page(plain, model, tokens, window):
    ids = tiny.prompt(tokens + 3)
    cache = LoomCache(tiny.passthrough(model, window=WINDOWS[window]), model)
    torch.testing.assert_close(
        tiny.run(model, cache, ids, [tokens, 1, 1, 1]),
        tiny.run(plain, tiny.dense(plain), ids, [tokens, 1, 1, 1]),
        atol=1e-4,
        rtol=0,
    )
    assert cache.nbytes() == cache.plan.nbytes(1, tokens + 3, model.dtype)


@pytest.mark.parametrize("group", [128, 256])
def test_wide_token_groups(plain, model, group):
    tokens = tiny.prompt(280)
    expected = tiny.run(plain, tiny.dense(plain), tokens, [270, 4, 1, 1, 1, 1, 1, 1])
    cache = LoomCache(tiny.eight_bit(model, key_group_size=group), model)
    error = tiny.run(model, cache, tokens, [270, 4, 1, 1, 1, 1, 1, 1]) - expected
    assert cache.packed_layers[0].num_pages == 280 // group
    assert 0 < error.std() < 0.1 * expected.std()


def test_an_empty_prompt_is_an_error_and_leaves_the_cache_usable(model):
    cache = LoomCache(tiny.passthrough(model), model)
    with pytest.raises((RuntimeError, ValueError)):
        tiny.greedy(model, torch.empty((1, 0), dtype=torch.long), cache)
    assert cache.get_seq_length() == 0
    assert tiny.greedy(model, tiny.prompt(5), cache, new=3).shape == (1, 8)


# -- however the prompt arrives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["none", "sinks and ratio"])
@pytest.mark.parametrize("plan", [tiny.mixed, tiny.eight_bit])
def test_codes_and_tokens_do_not_depend_on_the_cuts(precise, plan, window):
    plan, prompt = plan(precise, prefill="quantized", window=WINDOWS[window]), tiny.prompt(150)
    results = []
    for chunks in ([150], [64, 64, 22], [1, 99, 50], [37, 37, 37, 39], [1] * 150):
        cache = LoomCache(plan, precise)
        logits = tiny.run(precise, cache, prompt, chunks)
        codes = [data.clone() for data in tiny.codes(cache)]
        token = logits[:, -1:].argmax(-1)
        results.append((codes, logits, tiny.greedy(precise, torch.cat([prompt, token], 1), cache, new=20)))
    codes, logits, tokens = results[0]
    assert codes[0].shape[2] > 0
    for other_codes, other_logits, other_tokens in results[1:]:
        assert all(a.equal(b) for a, b in zip(codes, other_codes, strict=True))
        torch.testing.assert_close(other_logits, logits, atol=1e-9, rtol=0)
        assert other_tokens.equal(tokens)


def test_an_exact_prefill_does_depend_on_the_cuts(precise):
    """The other side of the test above: it could fail."""
    once, cut = (LoomCache(tiny.mixed(precise), precise) for _ in range(2))
    first = tiny.run(precise, once, tiny.prompt(150), [150])
    assert (tiny.run(precise, cut, tiny.prompt(150), [100, 50]) - first).abs().max() > 1e-3

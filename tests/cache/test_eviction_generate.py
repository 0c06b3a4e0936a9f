"""Eviction in whole models: generate, beams, padding, prompts in pieces, families."""

from __future__ import annotations

import pytest
import tiny
import torch
from evicting import POLICIES, evicting
from tiny import FAMILIES, build, enabled, greedy, prompt, run

from kvloom.cache import LoomCache, enable
from kvloom.errors import CacheError
from kvloom.plan import Fingerprint, LayerPlan, Plan, TensorSpec, Window


@pytest.fixture(scope="module")
def model():
    return enabled(build("llama"))


def slots(cache):
    """Kept slots of every layer, ``[batch, kv_heads, tokens]``."""
    return [layer._slots() for layer in cache.packed_layers.values()]


def four_sinks(model, **options):
    return tiny.mixed(model, window=Window(sinks=4), **options)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_go_on_within_the_budget(family):
    model = enabled(build(family))
    plan = evicting(tiny.eight_bit(model), "snapkv", 100)
    cache = LoomCache(plan, model)
    tokens = greedy(model, prompt(300, batch=2), cache, new=70)
    assert tokens.shape == (2, 370)
    assert {layer._resident() for layer in cache.packed_layers.values()} == {100 + 69}
    assert cache.nbytes() == plan.nbytes(2, 369, "float32", decoded=69)
    assert cache.get_seq_length() == 369


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_large_budget_gives_the_tokens_of_no_eviction(model, policy):
    plan = four_sinks(model)
    ours = greedy(model, prompt(150), LoomCache(evicting(plan, policy, 2000), model), new=40)
    assert ours.equal(greedy(model, prompt(150), LoomCache(plan, model), new=40))


def test_true_bits_count_every_token_seen(model):
    plan = evicting(tiny.passthrough(model), "snapkv", 100)
    cache = LoomCache(plan, model)
    run(model, cache, prompt(400), [400])
    kept = 8 * (2 + 4 * 2 * 16) * 2 * 100 / (2 * 2 * 400 * 16)  # slots and fp32 states of two heads
    assert cache.true_bits() == pytest.approx(kept, rel=0.01)
    assert cache.true_bits() == plan.true_bits(400, "float32")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_padded_batch_gives_what_each_prompt_gives_alone(model, policy):
    plan = evicting(Plan.uniform(model, 8, 8), policy, 130)
    long, short = prompt(330), prompt(270, seed=2)
    padded = torch.cat([torch.zeros(1, 60, dtype=torch.long), short], dim=1)
    inputs = torch.cat([long, padded])
    mask = torch.ones_like(inputs)
    mask[1, :60] = 0
    both = greedy(model, inputs, LoomCache(plan, model), new=20, attention_mask=mask)[:, 330:]
    alone = [greedy(model, one, LoomCache(plan, model), new=20)[:, one.shape[1] :] for one in (long, short)]
    # Rounding in another order may tip a choice late; a wrong token kept shows at once.
    assert both[:, :8].equal(torch.cat(alone)[:, :8])


def test_beams(model):
    plan = evicting(Plan.uniform(model, 8, 8), "h2o", 200)
    cache = LoomCache(plan, model)
    out = greedy(model, prompt(260, batch=2), cache, new=80, num_beams=3)
    assert out.shape == (2, 340)
    assert max(layer._resident() for layer in cache.packed_layers.values()) <= 200
    assert cache.packed_layers[0].batch_size == 6


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_generate_may_cut_the_prompt(model, policy):
    plan, tokens = evicting(four_sinks(model), policy, 150), prompt(310)
    whole, cut = LoomCache(plan, model), LoomCache(plan, model)
    expected = greedy(model, tokens, whole, new=5)
    cut.expect_prompt(310)
    assert greedy(model, tokens, cut, new=5, prefill_chunk_size=100).equal(expected)
    assert all(a.equal(b) for a, b in zip(slots(whole), slots(cut), strict=True))


def test_a_second_turn_goes_on_in_the_same_cache(model):
    plan = evicting(four_sinks(model), "snapkv", 150)
    cache = LoomCache(plan, model)
    first = greedy(model, prompt(310), cache, new=30)
    second = torch.cat([first, prompt(200, seed=3)], dim=1)
    out = greedy(model, second, cache, new=30)
    assert out.shape == (1, 570)
    assert cache.get_seq_length() == 569
    assert {layer._resident() for layer in cache.packed_layers.values()} == {150 + 29}


def test_one_layer_at_a_time_holds_a_whole_prompt():
    model = enabled(build("llama", num_hidden_layers=4))
    cache = LoomCache(evicting(tiny.eight_bit(model), "snapkv", 100), model)
    held = []

    def note(*_):
        layers = [layer for layer in cache.packed_layers.values() if layer.is_initialized]
        held.append(max(layer.tail.tokens for layer in layers))

    for block in model.model.layers:
        block.mlp.register_forward_hook(note)
    run(model, cache, prompt(500), [500])
    assert len(held) == 4
    assert max(held) < 100


def test_keys_before_rope_are_turned_by_the_places_they_keep(model):
    spec = TensorSpec(bits=8, grouping="per_channel", pre_rope=True)
    value = TensorSpec(bits=8, grouping="per_token", group_size="head_dim")
    of = Fingerprint.of(model)
    plan = Plan(model=of, layers=(LayerPlan(layers="0-1", key=spec, value=value),))
    for policy in ("snapkv", "adakv"):
        kept = evicting(plan, policy, 150)
        same = Plan(model=of, layers=(kept.layers[0].model_copy(update={"key": value}),))
        ours, theirs = LoomCache(kept, model), LoomCache(same, model)
        for cache in (ours, theirs):
            run(model, cache, prompt(300), [300])
        assert slots(ours)[0].equal(slots(theirs)[0])
        key, _ = ours.packed_layers[0]._states()
        expected, _ = theirs.packed_layers[0]._states()
        real = slots(ours)[0] >= 0
        assert float((key - expected)[real].abs().max()) < 0.1 * float(expected[real].abs().max())


def test_batch_invariant_attention_reads_what_is_kept():
    model = build("llama")
    enable(model, batch_invariant=True)
    plan = evicting(Plan.uniform(model, 4, 4), "snapkv", 120)
    outputs = []
    for rows in (slice(0, 2), slice(1, 2)):
        cache = LoomCache(plan, model)
        outputs.append(run(model, cache, prompt(250, batch=2)[rows], [200, *[1] * 50])[-1])
    assert outputs[0].equal(outputs[1])


def test_assistants_are_refused(model):
    cache = LoomCache(evicting(tiny.eight_bit(model), "snapkv", 100), model)
    with pytest.raises(CacheError, match="cannot decode with an assistant"):
        greedy(model, prompt(120), cache, new=5, prompt_lookup_num_tokens=3)


def test_layers_may_differ(model):
    plan = four_sinks(model)
    entry = plan.layers[0]
    first, second = (entry.model_copy(update={"layers": n}) for n in range(2))
    evicts = evicting(plan.model_copy(update={"layers": (first, second)}), "snapkv", 100).layers
    cache = LoomCache(Plan(model=plan.model, layers=(first, evicts[1])), model)
    greedy(model, prompt(300), cache, new=40)
    assert (cache.packed_layers[0].length, cache.packed_layers[1]._resident()) == (339, 139)
    assert cache.nbytes() == cache.plan.nbytes(1, 339, "float32", decoded=39)

"""Filling caches from one prompt, and greedy decoding, against transformers' own generate."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from kvloom.cache import ATTENTION, LoomCache, disable, enable
from kvloom.errors import DataError
from kvloom.evaluate import Contestant, dense_contestant, plan_contestant
from kvloom.evaluate._through import Prompt, attention, greedy, stop_tokens
from kvloom.plan import Evict, Plan
from tests.evaluate.tiny_llama import random_windows, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def packed(model, prefill="exact"):
    plan = Plan.uniform(model, 3, 3)
    return plan_contestant(plan, model, name="K3V3", method="uniform", prefill=prefill)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@torch.no_grad()
def test_a_filled_cache_is_what_a_forward_pass_of_the_prompt_leaves(model, prefill):
    tokens = random_windows(1, 150)
    contestant = packed(model, prefill)
    cache, logits = Prompt(model, tokens).fill(contestant)
    expected = LoomCache(contestant.plan, model)
    enable(model)
    last = model(tokens, past_key_values=expected).logits[0, -1]
    disable(model)
    assert torch.allclose(logits, last, atol=1e-4)
    assert cache.get_seq_length() == 150
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            same = a == b if a.dtype == torch.uint8 else torch.isclose(a, b, atol=1e-4)
            assert same.sum() >= 0.999 * same.numel(), name


def evicting(model):
    plan = Plan.uniform(model, 8, 8)
    entry = plan.layers[0].model_copy(update={"evict": Evict(policy="snapkv", budget=60)})
    kept = plan.model_copy(update={"layers": (entry,)})
    return plan_contestant(kept, model, name="snapkv", method="uniform")


@pytest.mark.parametrize("make", [dense_contestant, packed, evicting])
@torch.no_grad()
def test_greedy_writes_what_generate_writes(model, make):
    tokens = random_windows(1, 130)
    contestant = make(model)
    written = greedy(model, contestant, Prompt(model, tokens), 12, frozenset()).tokens[0]
    if contestant.plan:
        enable(model)
    expected = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=contestant.make_cache(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    disable(model)
    assert written == expected[0, 130:].tolist()


@torch.no_grad()
def test_greedy_stops_before_an_end_token(model):
    tokens = random_windows(1, 20)
    dense = dense_contestant(model)
    prompt = Prompt(model, tokens)
    (written,) = greedy(model, dense, prompt, 8, frozenset()).tokens
    stop = frozenset([written[4]])
    assert greedy(model, dense, prompt, 8, stop).tokens == [written[: written.index(written[4])]]


@torch.no_grad()
def test_greedy_can_be_made_to_write_before_it_stops():
    model = tiny_model()
    dense, prompt = dense_contestant(model), Prompt(model, random_windows(1, 20))
    ((first,),) = greedy(model, dense, prompt, 1, frozenset()).tokens
    assert greedy(model, dense, prompt, 3, frozenset([first])).tokens == [[]]
    (forced,) = greedy(model, dense, prompt, 3, frozenset([first]), at_least=3).tokens
    assert len(forced) == 3
    assert first not in forced
    assert greedy(model, dense, prompt, 3, frozenset()).tokens[0][0] == first  # the shared logits are as they were


@torch.no_grad()
def test_greedy_ends_where_it_is_told_and_gives_the_cache_it_filled(model):
    prompt = Prompt(model, random_windows(1, 70))
    written = greedy(model, packed(model), prompt, 9, frozenset(), ended=lambda tokens: len(tokens) == 4)
    assert [len(tokens) for tokens in written.tokens] == [4]
    assert written.cache.get_seq_length() == 70 + 3


@pytest.mark.parametrize("make", [dense_contestant, packed, evicting])
@torch.no_grad()
def test_prompts_together_are_continued_as_each_alone(make):
    model = tiny_model().double()
    contestant, rows = make(model), random_windows(3, 130)
    alone = [greedy(model, contestant, Prompt(model, row[None]), 12, frozenset()).tokens[0] for row in rows]
    assert greedy(model, contestant, Prompt(model, rows), 12, frozenset()).tokens == alone
    stop = frozenset([alone[1][4]])
    ends = [next((at for at, token in enumerate(tokens) if token in stop), 12) for tokens in alone]
    assert len(set(ends)) > 1
    written = greedy(model, contestant, Prompt(model, rows), 12, stop)
    assert written.tokens == [tokens[:end] for tokens, end in zip(alone, ends, strict=True)]


@torch.no_grad()
def test_sliding_window_models_are_filled_by_a_pass_of_their_own():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    model = MistralForCausalLM(config).eval()
    tokens = random_windows(1, 40)
    dense = Contestant("dense", "dense", None, lambda: DynamicCache(config=config))
    cache, _ = Prompt(model, tokens).fill(dense)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_a_prompt_of_the_wrong_length_is_refused(model):
    picky = Contestant("picky", "peer", None, DynamicCache, token_multiple=64)
    with pytest.raises(DataError, match="the prompt has 20"):
        Prompt(model, random_windows(1, 20)).fill(picky)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_attention_is_switched_and_given_back(enabled, wanted):
    model = tiny_model()
    if enabled:
        enable(model)
    before = model.config._attn_implementation
    with attention(model, packed=wanted):
        assert (model.config._attn_implementation == ATTENTION) == wanted
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("given", "stops"), [(None, set()), (2, {2}), ([2, 5], {2, 5})])
def test_stop_tokens(given, stops):
    model = tiny_model()
    model.generation_config.eos_token_id = given
    assert stop_tokens(model) == stops

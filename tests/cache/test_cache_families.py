"""The packed path against each family's own eager attention over its own cache."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MllamaTextConfig,
)

from kvloom.cache import LoomCache, disable, enable, loom_attention
from kvloom.cache._attention import invariant_attention
from kvloom.errors import ModelError
from kvloom.plan import Fingerprint, Plan

TOKENS = 132
CHUNKS = [100, 26, 1, 1, 1, 1, 1, 1]
PREFILLS = ("exact", "quantized")
FALCONS = {
    "multi-query": {"multi_query": True},
    "multi-head": {"multi_query": False},
    "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "alibi": {"alibi": True},
}


def falcon(kind):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        **FALCONS[kind],
    )
    return FalconForCausalLM(config).eval()


def assert_close_to_dense(model, *, relative=0.05):
    """Passthrough equals the dense cache to fp32 rounding, 8 bits comes near, in both prefill modes."""
    tokens = tiny.prompt(TOKENS)
    expected = tiny.run(model, tiny.dense(model), tokens, CHUNKS)
    enable(model)
    for prefill in PREFILLS:
        exact = LoomCache(tiny.passthrough(model, prefill=prefill), model)
        torch.testing.assert_close(tiny.run(model, exact, tokens, CHUNKS), expected, atol=1e-4, rtol=0)
        packed = LoomCache(tiny.eight_bit(model, prefill=prefill), model)
        error = tiny.run(model, packed, tokens, CHUNKS) - expected
        assert 0 < error.std() < relative * expected.std()
        assert packed.nbytes() == packed.plan.nbytes(1, TOKENS, model.dtype)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_follow_the_dense_cache(family):
    assert_close_to_dense(tiny.build(family))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_passthrough_generates_the_dense_tokens(family):
    model, prompt = tiny.build(family), tiny.prompt(61)
    expected = tiny.greedy(model, prompt, tiny.dense(model), new=8)
    enable(model)
    assert tiny.greedy(model, prompt, LoomCache(tiny.passthrough(model), model), new=8).equal(expected)


@pytest.mark.parametrize("ratio", [1, 3, 7, 16])
def test_grouped_query_attention(ratio):
    assert_close_to_dense(
        tiny.build("llama", num_attention_heads=2 * ratio, hidden_size=32 * ratio, num_hidden_layers=1)
    )


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim):
    assert_close_to_dense(tiny.build("llama", head_dim=head_dim, num_hidden_layers=1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_bfloat16_is_as_near_the_truth_as_the_dense_cache(family):
    model, tokens = tiny.build(family), tiny.prompt(TOKENS)
    truth = tiny.run(model, tiny.dense(model), tokens, CHUNKS)
    model.bfloat16()
    dense = tiny.run(model, tiny.dense(model), tokens, CHUNKS).float()
    enable(model)
    cache = LoomCache(tiny.passthrough(model), model)
    packed = tiny.run(model, cache, tokens, CHUNKS).float()
    assert (packed - truth).std() < 1.2 * (dense - truth).std()
    assert cache.nbytes() == cache.plan.nbytes(1, TOKENS, torch.bfloat16)


@pytest.mark.parametrize("enable_it", [False, True])
@pytest.mark.parametrize("plan", [tiny.passthrough, tiny.eight_bit])
def test_autocast_is_as_near_the_truth_as_with_the_dense_cache(plan, enable_it):
    """Autocast gives keys in fp32 and values in bf16."""
    model, tokens = tiny.build("llama"), tiny.prompt(TOKENS)
    model.set_attn_implementation("sdpa")
    truth = tiny.run(model, tiny.dense(model), tokens, CHUNKS)
    with torch.autocast("cpu", torch.bfloat16):
        dense = tiny.run(model, tiny.dense(model), tokens, CHUNKS).float()
        if enable_it:
            enable(model)
        cache = LoomCache(plan(model), model)
        packed = tiny.run(model, cache, tokens, CHUNKS).float()
    assert (packed - truth).std() < 1.3 * (dense - truth).std()
    assert cache.nbytes() == cache.plan.nbytes(1, TOKENS, torch.float32)


def test_autocast_packs_what_has_fp16_parameters():
    model, tokens = tiny.enabled(tiny.build("llama")), tiny.prompt(TOKENS)
    cache = LoomCache(tiny.mixed(model), model)
    with torch.autocast("cpu", torch.bfloat16):
        tiny.run(model, cache, tokens, CHUNKS)
    assert cache.nbytes() == cache.plan.nbytes(1, TOKENS, torch.float32)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss"])
def test_enabled_models_still_run_their_own_cache(family):
    model, tokens = tiny.build(family), tiny.prompt(80)
    expected = tiny.run(model, tiny.dense(model), tokens, [40, 38, 1, 1])
    enable(model)
    torch.testing.assert_close(tiny.run(model, tiny.dense(model), tokens, [40, 38, 1, 1]), expected, atol=1e-4, rtol=0)


def test_a_text_model_inside_another_model():
    text = tiny.build("gemma3").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    assert_close_to_dense(model)
    disable(model)
    assert model.config.get_text_config(decoder=True)._attn_implementation == "eager"


def sees(text, build):
    """A tiny model that reads an image of four tokens before its text, and what it is given."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = build({**vision, "image_size": 28, "patch_size": 14}, text).eval()
    tokens = tiny.prompt(70).clamp(max=tiny.VOCABULARY - 2)
    tokens[:, :4] = tiny.VOCABULARY - 1
    return model, {"input_ids": tokens, "attention_mask": tokens > 0, "pixel_values": torch.randn(1, 3, 28, 28)}


def gemma3_that_sees(vision, text):
    config = Gemma3Config(
        vision_config=vision, text_config=text, image_token_index=tiny.VOCABULARY - 1, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config)


def llava(vision, text):
    config = LlavaConfig(
        vision_config={**vision, "model_type": "clip_vision_model"},
        text_config=text,
        image_token_index=tiny.VOCABULARY - 1,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(("family", "build"), [("gemma3", gemma3_that_sees), ("llama", llava)])
def test_a_model_that_sees_reads_pages(family, build):
    model, inputs = sees(tiny.build(family).config.to_dict(), build)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    enable(model)
    cache = LoomCache(tiny.passthrough(model), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False).equal(expected)


def test_layers_that_are_not_causal_read_plain_tensors():
    query, key, value = (torch.randn(1, heads, 9, 16) for heads in (4, 2, 2))
    expected = scaled_dot_product_attention(query, key, value, scale=0.25, enable_gqa=True).transpose(1, 2)
    for attention in (loom_attention, partial(loom_attention, softcap=1e6), invariant_attention):
        output, _ = attention(torch.nn.Module(), query, key, value, None, scaling=0.25, is_causal=False)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


def test_pages_are_not_read_by_layers_that_are_not_causal():
    model = tiny.build("llama")
    cache = LoomCache(tiny.passthrough(model), tiny.enabled(model))
    query, key, value = (torch.randn(1, heads, 9, 16) for heads in (4, 2, 2))
    handle, _ = cache.update(key, value, 0)
    with pytest.raises(ModelError, match="not causal"):
        loom_attention(torch.nn.Module(), query, handle, handle, None, is_causal=False)


def test_enable_twice_and_disable_restore_the_attention():
    model = tiny.build("llama")
    before = model.config._attn_implementation
    enable(model)
    enable(model)
    assert model.config._attn_implementation == "kvloom"
    disable(model)
    assert model.config._attn_implementation == before
    disable(model)
    assert model.config._attn_implementation == before


def test_disable_respects_an_attention_chosen_since():
    model = tiny.enabled(tiny.build("llama"))
    model.set_attn_implementation("sdpa")
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_follows_enable_and_disable():
    model, tokens = tiny.build("llama"), tiny.prompt(TOKENS)
    expected = tiny.run(model, tiny.dense(model), tokens, CHUNKS)
    cache = LoomCache(tiny.passthrough(model), model)
    enable(model)
    first = tiny.run(model, cache, tokens[:, :90], [90])
    disable(model)
    with pytest.warns(UserWarning, match="unpacks"):
        second = tiny.run(model, cache, tokens[:, 90:130], [38, 1, 1])
    enable(model)
    third = tiny.run(model, cache, tokens[:, 130:], [1, 1])
    torch.testing.assert_close(torch.cat([first, second, third], 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", FALCONS)
def test_falcon_uses_the_dense_way(kind):
    model, tokens = falcon(kind), tiny.prompt(TOKENS)
    with pytest.raises(ModelError, match="FalconForCausalLM computes attention itself"):
        enable(model)
    expected = tiny.run(model, tiny.dense(model), tokens, CHUNKS)
    cache = LoomCache(tiny.passthrough(model), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = tiny.run(model, cache, tokens, CHUNKS)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert [w.category for w in caught] == [UserWarning]
    assert cache.nbytes() == cache.plan.nbytes(1, TOKENS, model.dtype)


def test_the_dense_way_warns_once_a_cache():
    model = tiny.build("llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            tiny.run(model, LoomCache(tiny.eight_bit(model), model), tiny.prompt(70), [66, 2, 1, 1])
    assert len(caught) == 2
    assert "memory is saved, speed is not" in str(caught[0].message)


def test_the_dense_way_reads_what_the_enabled_model_reads():
    model, tokens = tiny.build("llama"), tiny.prompt(TOKENS)
    with pytest.warns(UserWarning, match="unpacks"):
        unpacked = tiny.run(model, LoomCache(tiny.mixed(model), model), tokens, CHUNKS)
    enable(model)
    packed = tiny.run(model, LoomCache(tiny.mixed(model), model), tokens, CHUNKS)
    torch.testing.assert_close(packed, unpacked, atol=1e-3, rtol=0)


def test_latent_attention_is_refused():
    config = DeepseekV3Config(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, first_k_dense_replace=2
    )
    with pytest.raises(ModelError, match="latent"):
        Plan.uniform(config)
    plan = tiny.passthrough(tiny.build("llama"))
    with pytest.raises(ModelError, match="latent"):
        LoomCache(plan, config)


def test_a_model_that_looks_into_its_cache_for_images_is_refused():
    config = MllamaTextConfig(num_hidden_layers=4, cross_attention_layers=[1])
    with pytest.raises(ModelError, match="keeps keys and values of images in layers of its cache"):
        Plan.uniform(config)


def test_a_model_of_sliding_windows_only_is_refused():
    with pytest.raises(ModelError, match="no full-attention layer"):
        Plan.uniform(MistralConfig(sliding_window=16, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("qwen2", {}, "architecture"),
        ("llama", {"num_hidden_layers": 3}, "num_layers"),
        ("llama", {"num_key_value_heads": 4}, "num_kv_heads"),
        ("llama", {"head_dim": 32}, "head_dim"),
    ],
)
def test_another_models_plan_is_refused(family, changes, field):
    plan = tiny.passthrough(tiny.build("llama"))
    with pytest.raises(ModelError, match=f"the plan is for {field} = "):
        LoomCache(plan, tiny.build(family, **changes))


def test_another_choice_of_full_layers_is_refused():
    model = tiny.build("gemma3")
    fingerprint = Fingerprint.of(model)
    assert fingerprint.packed_layers == (0, 2)
    other = tiny.build("gemma3", layer_types=["sliding_attention", "full_attention", "full_attention"])
    with pytest.raises(ModelError, match="packed_layers"):
        LoomCache(tiny.passthrough(model), other)

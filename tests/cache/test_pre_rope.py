"""Keys packed before their rotary embedding: what models see of them, what is packed, and who is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from drawn import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvloom import codecs
from kvloom.cache import LoomCache, Rope, rope_of
from kvloom.errors import CacheError, ModelError
from kvloom.plan import Fingerprint, HeadPlan, LayerPlan, Plan, TensorSpec, Window
from kvloom.signals._stored import as_read

TOKENS = 200
CHUNKS = [150, 26, *[1] * 24]
VALUE = TensorSpec(bits=8, grouping="per_token", group_size="head_dim")
SCALINGS = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "rope_theta": 100.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def key_spec(bits=8, **fields):
    return TensorSpec(**{"bits": bits, "grouping": "per_channel", "pre_rope": True, **fields})


def plan_of(model, *, window=None, prefill="exact", key=None, heads=None):
    fingerprint = Fingerprint.of(model)
    entry = LayerPlan(
        layers=",".join(map(str, fingerprint.packed_layers)),
        key=key or key_spec(),
        value=VALUE,
        window=window or Window(sinks=4),
        heads=heads or {},
    )
    return Plan(model=fingerprint, layers=(entry,), prefill=prefill)


def assert_near_dense(model, prefill, chunks=CHUNKS):
    tokens = tiny.prompt(sum(chunks))
    expected = tiny.run(model, tiny.dense(model), tokens, chunks)
    cache = LoomCache(plan_of(model, prefill=prefill), tiny.enabled(model))
    error = tiny.run(model, cache, tokens, chunks) - expected
    assert 0 < error.std() < 0.05 * expected.std()
    assert cache.nbytes() == cache.plan.nbytes(1, sum(chunks), model.dtype)


# -- the turn ---------------------------------------------------------------------------------------------------------


@given(
    pairs=st.sampled_from([1, 4, 8]), slot=st.integers(0, 10**6), tokens=st.integers(1, 70), seed=st.integers(0, 999)
)
@settings(max_examples=30)
def test_before_and_after_are_inverse(pairs, slot, tokens, seed):
    rope = Rope(10000.0 ** (-torch.arange(pairs) / pairs))
    x = torch.randn((2, 3, tokens, 16), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rope.after(rope.before(x, slot), slot), x, atol=1e-6, rtol=0)
    assert rope.before(x, slot)[..., 2 * pairs :].equal(x[..., 2 * pairs :])
    whole, part = rope.before(x, slot), rope.before(x[..., tokens // 2 :, :], slot + tokens // 2)
    assert whole[..., tokens // 2 :, :].equal(part)


def test_after_is_what_transformers_does():
    model = tiny.build("llama")
    key = torch.randn(1, 2, 40, 16)
    cos, sin = model.model.rotary_emb(key, torch.arange(100, 140)[None])
    _, expected = apply_rotary_pos_emb(key, key, cos, sin)
    torch.testing.assert_close(rope_of(model, [0, 1]).after(key, 100), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_turn(dtype):
    rope = Rope(torch.tensor([1.0, 0.1]))
    x = torch.randn(1, 1, 9, 4).to(dtype)
    assert rope.before(x, 3).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rope.after(x, 3).dtype == dtype
    assert bool(rope.after(torch.full((1, 1, 9, 4), 65504.0).half(), 0).isfinite().all())


# -- what models see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_follow_the_dense_cache(family, prefill):
    assert_near_dense(tiny.build(family), prefill)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_embeddings(scaling):
    """Contexts beyond the original one, where dynamic scaling changes the frequencies on the way."""
    model = tiny.build("llama", max_position_embeddings=128, rope_parameters=SCALINGS[scaling])
    assert_near_dense(model, "exact")
    if scaling == "dynamic":
        rotary = model.model.rotary_emb
        assert not rotary.inv_freq.equal(rotary.original_inv_freq)
        assert rope_of(model, [0]).inv_freq.equal(rotary.original_inv_freq)


def test_the_dense_way_reads_what_the_enabled_model_reads():
    model, tokens = tiny.build("llama"), tiny.prompt(TOKENS)
    plan = plan_of(model, key=key_spec(2), heads={1: HeadPlan(key=key_spec(3, pre_rope=False, rotation="hadamard"))})
    with pytest.warns(UserWarning, match="unpacks"):
        unpacked = tiny.run(model, LoomCache(plan, model), tokens, CHUNKS)
    packed = tiny.run(tiny.enabled(model), LoomCache(plan, model), tokens, CHUNKS)
    torch.testing.assert_close(packed, unpacked, atol=1e-3, rtol=0)


def test_generate_with_left_padding_and_beams():
    model = tiny.enabled(tiny.build("llama"))
    inputs = tiny.prompt(90, batch=2)
    mask = torch.ones_like(inputs)
    inputs[0, :30], mask[0, :30] = 0, 0
    expected = model(inputs, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    cache = LoomCache(plan_of(model), model)
    tokens = tiny.greedy(model, inputs, cache, new=4, attention_mask=mask, num_beams=2)
    assert tokens.shape == (2, 94)
    cache = LoomCache(plan_of(model, prefill="quantized"), model)
    actual = model(
        inputs, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache
    ).logits[:, -1]
    assert 0 < (actual - expected).std() < 0.05 * expected.std()


# -- what is packed ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny.enabled(tiny.build("llama"))


def states(tokens, seed=0):
    """Keys whose channels hardly change before their embedding, and values."""
    key, value = torch.randn((2, 1, 2, tokens, 16), generator=torch.Generator().manual_seed(seed))
    return 5 * torch.linspace(-1, 1, 16) + 0.1 * key, value


def turned(model, key):
    """``R(slot) k`` of a key at every slot, pair by pair, as complex numbers in float64."""
    angles = torch.arange(key.shape[2], dtype=torch.float64)[:, None] * model.model.rotary_emb.inv_freq.double()
    pairs = torch.complex(key[..., :8].double(), key[..., 8:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("sinks", [0, 4])
def test_pages_hold_the_codes_of_keys_before_their_embedding(model, sinks):
    plain, value = states(140)
    key = turned(model, plain).float()
    plan = plan_of(model, key=key_spec(3), window=Window(sinks=sinks))
    cache = LoomCache(plan, model)
    cache.update(key, value, 0)
    layer = cache.packed_layers[0]
    assert layer.num_pages == 2
    stored, _ = layer._dense(layer._handle(layer.tail, torch.zeros(1)))
    whole = slice(sinks, sinks + 128)
    expected = plain.clone()
    expected[:, :, whole] = codecs.as_stored(plain[:, :, whole], plan.spec(0).key.format(16), 64)
    torch.testing.assert_close(stored, turned(model, expected).float(), atol=1e-4, rtol=0)
    assert stored[:, :, : whole.start].equal(key[:, :, : whole.start])
    assert stored[:, :, whole.stop :].equal(key[:, :, whole.stop :])


def test_channels_that_hardly_change_are_packed_better(model):
    plain, value = states(128)
    key, errors = turned(model, plain).float(), []
    for pre_rope in (True, False):
        cache = LoomCache(plan_of(model, key=key_spec(2, pre_rope=pre_rope), window=Window()), model)
        cache.update(key, value, 0)
        layer = cache.packed_layers[0]
        stored, _ = layer._unpacked(layer.pages)
        errors.append(float((stored - key).norm()))
    assert 0 < errors[0] < 0.1 * errors[1]


@given(data=st.data(), bits=st.sampled_from([1, 2, 3, 4]), grouping=st.sampled_from(["per_channel", "per_token"]))
@settings(max_examples=15)
def test_pages_do_not_depend_on_how_tokens_arrive(model, data, bits, grouping):
    tokens, sinks = data.draw(st.integers(65, 280)), data.draw(st.sampled_from([0, 1, 4, 70]))
    places = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=5)))
    chunks = [b - a for a, b in zip([0, *places], [*places, tokens], strict=True)]
    spec = key_spec(bits, grouping=grouping, group_size=16, outliers=data.draw(st.sampled_from([0.0, 0.05])))
    plan = plan_of(model, key=spec, window=Window(sinks=sinks, recent=data.draw(st.sampled_from([0, 20]))))
    key, value = states(tokens)
    key, caches = turned(model, key).float(), []
    for cut in ([tokens], chunks):
        cache = LoomCache(plan, model)
        for k, v in zip(key.split(cut, 2), value.split(cut, 2), strict=True):
            cache.update(k, v, 0)
        caches.append(cache)
        assert cache.packed_layers[0].nbytes() * 2 == plan.nbytes(1, tokens, "float32")
    assert_same(*caches)


def test_cropped_pages_come_back_as_decoded(model):
    key, value = states(220)
    key = turned(model, key).float()
    cache = LoomCache(plan_of(model, key=key_spec(4)), model)
    for layer in range(2):
        cache.update(key[:, :, :200], value[:, :, :200], layer)
    layer = cache.packed_layers[0]
    before, _ = layer._unpacked(layer.pages)
    cache.crop(-40)
    assert (layer.num_pages, layer.tail.tokens) == (2, 28)
    assert layer.tail.key.equal(before[:, :, 128:156])
    cache.crop(-50)
    assert (layer.num_pages, layer.tail.tokens) == (1, 42)
    assert layer.tail.key.equal(before[:, :, 64 : 64 + 42])
    cache.update(key[:, :, 110:], value[:, :, 110:], 0)
    assert layer.num_pages == 3
    again, _ = layer._unpacked(layer.pages)
    assert again[:, :, :64].equal(before[:, :, :64])
    torch.testing.assert_close(again[:, :, 64:106], before[:, :, 64:106], atol=0.2, rtol=0)


def test_non_finite_keys_are_refused_or_clamped(model):
    key, value = states(70)
    key[0, 0, 3, 3] = torch.nan
    with pytest.raises(CacheError, match="NaN, infinity"):
        LoomCache(plan_of(model, window=Window()), model).update(key, value, 0)
    cache = LoomCache(plan_of(model, window=Window()), model, nonfinite="clamp")
    cache.update(key, value, 0)
    layer = cache.packed_layers[0]
    assert bool(layer._unpacked(layer.pages)[0].isfinite().all())


def test_a_loaded_prefix_goes_on_as_the_saved_one(model, tmp_path):
    plan, path, prompt = plan_of(model, key=key_spec(3)), tmp_path / "prefix.safetensors", tiny.prompt(TOKENS)
    cache = LoomCache(plan, model)
    tiny.run(model, cache, prompt[:, :150], [150])
    cache.save(path)
    loaded = LoomCache.load(path, plan, model)
    ours, theirs = (tiny.run(model, way, prompt[:, 150:], [26, *[1] * 24]) for way in (cache, loaded))
    assert ours.equal(theirs)
    other = tiny.enabled(tiny.build("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0}))
    with pytest.raises(CacheError, match="another rotary embedding than this model's"):
        LoomCache.load(path, plan, other)


def test_a_profile_predicts_what_is_stored(model):
    plain, value = states(132)
    key, plan = turned(model, plain).float(), plan_of(model, key=key_spec(2))
    cache = LoomCache(plan, model)
    cache.update(key, value, 0)
    layer = cache.packed_layers[0]
    predicted = as_read(key, slice(4, 132), plan.spec(0).key.format(16), cache.rope)
    torch.testing.assert_close(predicted[:, :, 4:], layer._unpacked(layer.pages)[0], atol=1e-4, rtol=0)
    assert not predicted.equal(key)


# -- who is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("OPT", {}, "OPTForCausalLM has no rotary embedding to take back from its keys: leave pre_rope out"),
        ("Cohere", {}, "layer 0 of CohereForCausalLM does not turn its keys by halves of the head"),
        ("Glm", {}, "layer 0 of GlmForCausalLM does not turn its keys by halves of the head"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "layer 1 of SmolLM3ForCausalLM does not turn its keys"),
        ("Falcon", {"alibi": True}, "layer 0 of FalconForCausalLM does not turn its keys"),
    ],
)
def test_models_without_this_embedding(family, fields, says):
    config = getattr(transformers, family + "Config")(**{**tiny._BASE, **fields})
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with pytest.raises(ModelError, match=says) as caught:
        LoomCache(plan_of(model), model)
    assert "\n" not in str(caught.value)


def test_layers_that_turn_are_served_beside_layers_that_do_not():
    config = transformers.SmolLM3Config(**tiny._BASE, no_rope_layers=[1, 0])
    model = transformers.SmolLM3ForCausalLM(config).eval()
    fingerprint = Fingerprint.of(model)
    specs = {0: (key_spec(), VALUE), 1: (key_spec(pre_rope=False), VALUE)}
    assert LoomCache(Plan.from_specs(fingerprint, specs), model).rope is not None


def test_a_config_alone_has_no_embedding(model):
    with pytest.raises(ModelError, match="pre_rope needs a model's rotary embedding, and LlamaConfig is no model"):
        LoomCache(plan_of(model), model.config)


def test_a_cache_of_fixed_size(model):
    with pytest.raises(CacheError, match="a cache of fixed size cannot pack keys before RoPE: leave out max_tokens"):
        LoomCache(plan_of(model), model, max_tokens=100)

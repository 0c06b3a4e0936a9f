"""What goes wrong says so in one sentence, and leaves the cache as it was."""

from __future__ import annotations

import pytest
import tiny
import torch

from kvloom import kernels
from kvloom.cache import LoomCache
from kvloom.errors import CacheError, ModelError
from kvloom.plan import Plan, TensorSpec

BAD = {"nan": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf"), "too large": 7e4}


@pytest.fixture(scope="module")
def model():
    return tiny.enabled(tiny.build("llama"))


def snapshot(cache):
    """Everything the cache holds, sliding layers included."""
    held = {}
    for i, layer in enumerate(cache.layers):
        if i in cache.packed_layers:
            held |= {f"{i}.{name}": tensor.clone() for name, tensor in layer.tensors()}
        elif layer.is_initialized:
            held |= {f"{i}.keys": layer.keys.clone(), f"{i}.values": layer.values.clone()}
    return cache.get_seq_length(), held


def assert_unchanged(cache, before):
    length, held = snapshot(cache)
    assert length == before[0]
    assert held.keys() == before[1].keys()
    assert all(held[name].equal(before[1][name]) for name in held)


def states(model, tokens, *, batch=1, dtype=torch.float32):
    shape = (batch, 2, tokens, 16)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def spoiled(model, cache, layer):
    """One pass of 70 tokens in which the given layer's keys hold a NaN."""
    projection = model.model.layers[layer].self_attn.k_proj
    hook = projection.register_forward_hook(lambda *args: args[-1].index_fill(1, torch.tensor([3]), float("nan")))
    try:
        tiny.run(model, cache, tiny.prompt(70, seed=8), [70])
    finally:
        hook.remove()


@pytest.fixture(params=["at once", "late"])
def noticed(request, monkeypatch):
    """When packing says that it cannot: at once, or as a device does, by a flag that is looked at after the pass."""
    if request.param == "at once":
        return
    backend = type(kernels.backend(torch.device("cpu")))
    encode = backend.encode

    def late(self, key, value, layout, flags=None):
        try:
            return encode(self, key, value, layout)
        except CacheError:
            flags[0] = 1
            return encode(self, torch.zeros_like(key), torch.zeros_like(value), layout)

    monkeypatch.setattr(backend, "encode", late)


# -- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_states_are_an_error(model, bad, side):
    cache = LoomCache(tiny.eight_bit(model), model)
    pair = states(model, 100)
    pair[side][0, 1, 10, 5] = BAD[bad]
    with pytest.raises(CacheError, match=r"NaN, infinity or a magnitude above 65504.*find the layer"):
        cache.update(*pair, 0)
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_nonfinite_states_may_pass_where_nothing_is_rounded(model):
    cache = LoomCache(tiny.passthrough(model), model)
    key, value = states(model, 100)
    key[0, 1, 10, 5] = float("inf")
    cache.update(key, value, 0)
    assert cache.packed_layers[0].num_pages == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", BAD)
def test_clamp_packs_what_fp16_can_say(model, bad, dtype):
    cache = LoomCache(tiny.eight_bit(model), model, nonfinite="clamp")
    key, value = states(model, 64, dtype=dtype)
    key[0, 1, 10, 5] = BAD[bad]
    cache.update(key, value, 0)
    layer = cache.packed_layers[0]
    decoded, _ = layer._unpacked(layer.pages)
    assert decoded.isfinite().all()
    expected = {"nan": 0.0, "minus infinity": -65504.0}.get(bad, 65504.0)
    assert float(decoded[0, 1, 10, 5]) == pytest.approx(expected, rel=0.01, abs=0.05)
    others = decoded[0, 0] - key[0, 0]
    assert others.abs().max() < 0.05


def test_clamp_leaves_passthrough_sides_as_they_come(model):
    sixteen, eight = TensorSpec(bits=16, grouping="per_token"), TensorSpec(bits=8, grouping="per_channel")
    plan = Plan.from_specs(tiny.passthrough(model).model, dict.fromkeys((0, 1), (sixteen, eight)))
    cache = LoomCache(plan, model, nonfinite="clamp")
    key, value = states(model, 64)
    key[0, 1, 10, 5] = 7e4
    cache.update(key, value, 0)
    layer = cache.packed_layers[0]
    assert layer._unpacked(layer.pages)[0].equal(key)


@pytest.mark.usefixtures("noticed")
@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("llama", 1), ("gemma3", 2)])
def test_a_failed_pass_is_undone_in_every_layer(family, layer, prefill, recording):
    """The error may come from a late layer: earlier ones, sliding windows too, go back with it."""
    model = tiny.enabled(tiny.build(family))
    cache = LoomCache(tiny.mixed(model, prefill=prefill), model)
    tiny.run(model, cache, tiny.prompt(100), [100])
    if recording:
        cache.activate_past_recording()
    before = snapshot(cache)
    if recording and prefill == "exact":  # packs one pass later
        spoiled(model, cache, layer)
        with pytest.raises(CacheError, match="NaN"):
            cache.crop(0)
        return
    with pytest.raises(CacheError, match="NaN"):
        spoiled(model, cache, layer)
    assert_unchanged(cache, before)
    for i in range(len(cache.layers)):
        cache.layers[i].record_past = False
    twin = LoomCache(cache.plan, model)
    tiny.run(model, twin, tiny.prompt(100), [100])
    more = tiny.prompt(70, seed=4)
    assert tiny.run(model, cache, more, [66, 2, 2]).equal(tiny.run(model, twin, more, [66, 2, 2]))


@pytest.mark.usefixtures("noticed")
def test_a_failed_first_pass_leaves_an_empty_cache(model):
    cache = LoomCache(tiny.mixed(model), model)
    with pytest.raises(CacheError, match="NaN"):
        spoiled(model, cache, 1)
    assert cache.get_seq_length() == 0
    assert not cache.packed_layers[0].is_initialized
    prompt = tiny.prompt(90)
    fresh = tiny.greedy(model, prompt, LoomCache(cache.plan, model), new=5)
    assert tiny.greedy(model, prompt, cache, new=5).equal(fresh)


def test_nothing_old_is_held_once_a_pass_is_done(model):
    """What an undo would need counts as resident, so it is let go."""
    cache = LoomCache(tiny.mixed(model), model)
    tiny.run(model, cache, tiny.prompt(70), [66, 4])
    assert not cache._marks


@pytest.mark.usefixtures("noticed")
def test_an_abandoned_pass_does_not_confuse_the_next():
    """A pass may end outside the cache (out of memory, an interrupt) before it has reached every layer."""
    model = tiny.enabled(tiny.build("llama", num_hidden_layers=3))
    cache = LoomCache(tiny.mixed(model), model)
    tiny.run(model, cache, tiny.prompt(100), [100])
    for layer in (0, 1):
        cache.update(*states(model, 30), layer)
    cache.reset()
    with pytest.raises(CacheError, match="NaN"):
        spoiled(model, cache, 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]


# -- the wrong thing --------------------------------------------------------------------------------------------------


def test_another_batch_is_refused(model):
    cache = LoomCache(tiny.mixed(model), model)
    tiny.run(model, cache, tiny.prompt(70, batch=2), [70])
    before = snapshot(cache)
    with pytest.raises(CacheError, match="batch of 2 and got one of 3"):
        tiny.run(model, cache, tiny.prompt(5, batch=3), [5])
    assert_unchanged(cache, before)


def test_another_dtype_is_refused(model):
    cache = LoomCache(tiny.mixed(model), model)
    cache.update(*states(model, 70), 0)
    with pytest.raises(CacheError, match=r"torch\.float32 states and got torch\.bfloat16"):
        cache.update(*states(model, 5, dtype=torch.bfloat16), 0)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("shape", [(1, 3, 5, 16), (1, 2, 5, 32), (2, 5, 16)])
def test_other_shapes_are_refused(model, shape):
    cache = LoomCache(tiny.mixed(model), model)
    with pytest.raises(ModelError, match=r"keys have shape .* \[batch, 2, tokens, 16\]"):
        cache.update(torch.zeros(shape), torch.zeros(shape), 0)
    assert cache.get_seq_length() == 0


def test_quantized_prefill_needs_enable():
    model = tiny.build("llama")
    cache = LoomCache(tiny.mixed(model, prefill="quantized"), model)
    with pytest.warns(UserWarning, match="unpacks"):
        tiny.run(model, cache, tiny.prompt(65), [50, 14, 1])  # nothing read by this pass is packed by it
    before = snapshot(cache)
    with pytest.raises(CacheError, match=r'prefill="quantized" needs .* kvloom\.enable'):
        tiny.run(model, cache, tiny.prompt(70), [70])
    assert_unchanged(cache, before)
    tiny.enabled(model)
    tiny.run(model, cache, tiny.prompt(70), [70])
    assert cache.get_seq_length() == 135


def test_dropout_is_refused():
    model = tiny.enabled(tiny.build("llama", attention_dropout=0.1))
    model.train()
    with pytest.raises(ModelError, match="no dropout"):
        model(tiny.prompt(10), past_key_values=LoomCache(tiny.passthrough(model), model))
    model.eval()
    model(tiny.prompt(10), past_key_values=LoomCache(tiny.passthrough(model), model))

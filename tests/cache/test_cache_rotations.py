"""Calibrated rotations end to end: models, files, copies, fixed sizes; what holds of all plans is drawn elsewhere."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from drawn import config_of, fill, matrices, new_cache, states
from evicting import evicting

from kvloom.cache import LoomCache, loom_attention
from kvloom.errors import CacheError, PlanError
from kvloom.plan import Fingerprint, LayerPlan, Plan, Window
from kvloom.signals import calibrate_rotations

SIDE = {"bits": 8, "grouping": "per_token", "group_size": "head_dim", "rotation": "calibrated"}
BARE = {name: value for name, value in SIDE.items() if name != "rotation"}


def drawn(seed=0, **side):
    """One layer of two heads, turned by random matrices."""
    entry = LayerPlan.model_validate({"layers": 0, "key": SIDE | side, "value": SIDE | side})
    return Plan(model=Fingerprint.of(config_of(16)), layers=(entry,), tensors=matrices(16, seed))


def calibrated(model, base=tiny.mixed, **options):
    return calibrate_rotations(model, base(model, **options), tiny.prompt(200, batch=2, seed=8))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen2-sliding"])
def test_eight_bits_generate_what_the_dense_cache_generates(family):
    model = tiny.build(family).double()
    inputs = tiny.prompt(150)
    dense = tiny.run(model, tiny.dense(model), inputs, tiny.steps(150, 130))
    plan = calibrated(model, tiny.eight_bit)
    growing = tiny.run(model, LoomCache(plan, tiny.enabled(model)), inputs, tiny.steps(150, 130))
    fixed = tiny.run(model, LoomCache(plan, model, max_tokens=160), inputs, tiny.steps(150, 130))
    assert 0 < float((growing - dense).norm() / dense.norm()) < 0.05
    torch.testing.assert_close(fixed, growing, atol=1e-9, rtol=1e-9)


def test_exact_tokens_are_scored_as_if_nothing_was_turned():
    cache = new_cache(drawn())
    key, value = states(cache.plan, 60, dtype=torch.float64)
    query = torch.randn(1, 4, 60, 16, dtype=torch.float64)
    handle = fill(cache, key, value, [1, 59])
    output, _ = loom_attention(torch.nn.Module(), query[:, :, 1:], handle, handle, None, scaling=0.02)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.02, enable_gqa=True
    )
    torch.testing.assert_close(output, expected.transpose(1, 2)[:, 1:], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 200}])
@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_a_prompt_that_begins_reads_the_models_own_states(family, options, policy):
    """Bit for bit, whatever turns what is stored; what follows reads what is stored."""
    model = tiny.enabled(tiny.build(family))
    plan = tiny.mixed(model, window=Window(sinks=4))
    plan = evicting(plan, policy, 0.6) if policy else plan
    inputs, mask = tiny.prompt(150, batch=2), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :7] = 0
    cache, dense = LoomCache(plan, model, **options), tiny.dense(model)
    first = [tiny.run(model, it, inputs[:, :140], [140], attention_mask=mask[:, :140]) for it in (cache, dense)]
    assert first[0].equal(first[1])
    then = [tiny.run(model, it, inputs[:, 140:], [10], attention_mask=mask) for it in (cache, dense)]
    assert not torch.allclose(*then, atol=1e-3)


def test_without_enable_the_model_gets_its_own_states_back():
    model = tiny.build("llama")
    plan = calibrated(model, tiny.eight_bit)
    inputs = tiny.prompt(150)
    packed = tiny.run(tiny.enabled(model), LoomCache(plan, model), inputs, tiny.steps(150, 130))
    model = tiny.build("llama")
    with pytest.warns(UserWarning, match="unpacks"):
        dense = tiny.run(model, LoomCache(plan, model), inputs, tiny.steps(150, 130))
    torch.testing.assert_close(dense, packed, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"max_tokens": 260}])
def test_generation_goes_on_from_files_and_copies(options, tmp_path):
    model = tiny.enabled(tiny.build("llama"))
    plan = calibrated(model, window=Window(sinks=4))
    cache = LoomCache(plan, model, **options)
    prompt = tiny.prompt(150)
    tiny.run(model, cache, prompt, [150])
    cache.save(tmp_path / "prefix.safetensors")
    loaded = LoomCache.load(tmp_path / "prefix.safetensors", plan, model, **options)
    twin = copy.deepcopy(cache)
    assert twin.packed_layers[0].key_rotation is cache.packed_layers[0].key_rotation
    more = torch.cat([prompt, tiny.prompt(20, seed=3)], dim=1)
    expected = tiny.greedy(model, more, cache)
    assert tiny.greedy(model, more, loaded).equal(expected)
    assert tiny.greedy(model, more, twin).equal(expected)
    assert tiny.greedy(model, more, LoomCache(plan, model, **options)).shape == expected.shape


def test_batches_are_selected_and_the_matrices_stay():
    plan = drawn()
    key, value = states(plan, 100, batch=3)
    cache, one = new_cache(plan), new_cache(plan)
    fill(cache, key, value, [100])
    cache.batch_select_indices(torch.tensor([1]))
    fill(one, key[1:2], value[1:2], [100])
    for (name, ours), (_, theirs) in zip(cache.packed_layers[0].tensors(), one.packed_layers[0].tensors(), strict=True):
        assert ours.equal(theirs), name
    assert cache.nbytes() == plan.nbytes(1, 100, "float32")


def test_a_fixed_cache_counts_its_matrices():
    plan = drawn()
    bare = Plan(model=plan.model, layers=(LayerPlan.model_validate({"layers": 0, "key": BARE, "value": BARE}),))
    key, value = states(plan, 10)
    turned, plain = new_cache(plan, max_tokens=200), new_cache(bare, max_tokens=200)
    fill(turned, key, value, [10])
    fill(plain, key, value, [10])
    assert turned.nbytes() - plain.nbytes() == 2 * 2 * 16 * 16 * (2 + 4)


def test_a_cache_of_other_matrices_is_refused(tmp_path):
    cache = new_cache(drawn())
    fill(cache, *states(cache.plan, 100), [100])
    path = tmp_path / "prefix.safetensors"
    cache.save(path)
    assert LoomCache.load(path, drawn(), config_of(16)).get_seq_length() == 100
    for other in (drawn(seed=1), drawn(bits=4)):
        with pytest.raises(CacheError, match="another plan"):
            LoomCache.load(path, other, config_of(16))


def test_a_plan_without_its_file_makes_no_cache(tmp_path):
    drawn().save(tmp_path / "kv_plan.json")
    (tmp_path / "kv_plan.tensors.safetensors").unlink()
    with pytest.raises(PlanError, match=r"cannot read .*kv_plan\.tensors\.safetensors"):
        LoomCache(Plan.load(tmp_path / "kv_plan.json"), config_of(16))

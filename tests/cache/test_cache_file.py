"""A prefix on disk: round trips, and files that are refused."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvloom.cache import LoomCache
from kvloom.errors import CacheError, ModelError
from kvloom.plan import Window


@pytest.fixture(scope="module")
def model():
    return tiny.enabled(tiny.build("llama"))


@pytest.fixture
def saved(model, tmp_path):
    """A saved prefix of 150 tokens: its path and plan."""
    plan = tiny.mixed(model, window=Window(sinks=4))
    cache = LoomCache(plan, model)
    tiny.run(model, cache, tiny.prompt(150), [150])
    path = tmp_path / "prefix.safetensors"
    cache.save(path)
    return path, plan


def rewritten(path, *, change=lambda tensors: None, **header):
    """The file with some tensors or header fields changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **header}
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def assert_refused(path, plan, model, message):
    with pytest.raises(CacheError, match=message) as caught:
        LoomCache.load(path, plan, model)
    assert str(caught.value).rstrip().endswith(".")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "qwen2-sliding"])
@pytest.mark.parametrize("tokens", [10, 150])
def test_a_loaded_prefix_goes_on_as_the_saved_one(family, tokens, tmp_path):
    model = tiny.enabled(tiny.build(family))
    plan, path = tiny.mixed(model, window=Window(sinks=4, recent=16)), tmp_path / "prefix.safetensors"
    prompt = tiny.prompt(tokens)
    cache = LoomCache(plan, model)
    tiny.run(model, cache, prompt, [tokens])
    cache.save(path)
    loaded = LoomCache.load(path, plan, model)
    assert loaded.get_seq_length() == tokens
    assert loaded.nbytes() == cache.nbytes() == plan.nbytes(1, tokens, model.dtype)
    more = torch.cat([prompt, tiny.prompt(40, seed=6)], dim=1)
    assert tiny.greedy(model, more, loaded, new=30).equal(tiny.greedy(model, more, cache, new=30))


@pytest.mark.parametrize("tokens", [10, tiny.SLIDING - 1, tiny.SLIDING, 150])
@pytest.mark.parametrize(("room", "new_room"), [(None, 200), (200, None), (200, 230)])
def test_a_fixed_cache_and_a_growing_one_take_each_others_sliding_windows(tokens, room, new_room, tmp_path):
    model, path = tiny.enabled(tiny.build("gemma3")), tmp_path / "prefix.safetensors"
    plan, prompt = tiny.mixed(model), tiny.prompt(tokens + 30)
    expected = tiny.run(model, LoomCache(plan, model), prompt, [tokens, *tiny.steps(30, 12)])
    cache = LoomCache(plan, model, max_tokens=room)
    first = tiny.run(model, cache, prompt[:, :tokens], [tokens])
    cache.save(path)
    loaded = LoomCache.load(path, plan, model, max_tokens=new_room)
    rest = tiny.run(model, loaded, prompt[:, tokens:], tiny.steps(30, 12))
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, atol=1e-4, rtol=0)


def test_bfloat16_and_batches_survive(tmp_path):
    model = tiny.enabled(tiny.build("llama").bfloat16())
    plan, tokens = tiny.mixed(model), tiny.prompt(140, batch=3)
    cache = LoomCache(plan, model)
    tiny.run(model, cache, tokens, [140])
    cache.save(tmp_path / "prefix")
    loaded = LoomCache.load(tmp_path / "prefix", plan, model)
    more = tiny.prompt(4, batch=3, seed=2)
    assert tiny.run(model, loaded, more, [3, 1]).equal(tiny.run(model, cache, more, [3, 1]))


def test_saved_after_speculation(model, tmp_path):
    plan, prompt = tiny.mixed(model), tiny.prompt(30).repeat(1, 4)
    cache = LoomCache(plan, model)
    tokens = tiny.greedy(model, prompt, cache, new=20, prompt_lookup_num_tokens=4)
    cache.save(tmp_path / "prefix")
    loaded = LoomCache.load(tmp_path / "prefix", plan, model)
    assert tiny.greedy(model, tokens, loaded, new=10).equal(tiny.greedy(model, tokens, cache, new=10))


def test_a_loaded_prefix_does_not_change_with_its_file(saved, model):
    path, plan = saved
    loaded = LoomCache.load(path, plan, model)
    before = [t.clone() for layer in loaded.packed_layers.values() for _, t in layer.tensors()]
    with path.open("r+b") as file:
        file.seek(-20000, 2)
        file.write(bytes(20000))
    after = [t for layer in loaded.packed_layers.values() for _, t in layer.tensors()]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_saving_replaces_and_leaves_nothing_else(saved, model):
    path, plan = saved
    cache = LoomCache(plan, model)
    tiny.run(model, cache, tiny.prompt(20), [20])
    cache.save(path)
    assert LoomCache.load(path, plan, model).get_seq_length() == 20
    assert list(path.parent.iterdir()) == [path]


def test_a_save_that_fails_keeps_the_old_file(saved, model, monkeypatch):
    path, plan = saved
    before = path.read_bytes()

    def disk_full(tensors, name, metadata):
        name.write_bytes(before[:1000])
        raise OSError("no space left on device")

    monkeypatch.setattr("kvloom.cache._file.save_file", disk_full)
    with pytest.raises(CacheError, match=r"cannot write the cache .* no space left"):
        LoomCache.load(path, plan, model).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_saving_into_a_missing_folder_is_refused(saved, model, tmp_path):
    path, plan = saved
    with pytest.raises(CacheError, match="cannot write the cache"):
        LoomCache.load(path, plan, model).save(tmp_path / "missing" / "prefix")


def test_an_empty_cache_is_not_saved(model, tmp_path):
    with pytest.raises(CacheError, match="empty"):
        LoomCache(tiny.mixed(model), model).save(tmp_path / "prefix")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved, model, keep):
    path, plan = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert_refused(path, plan, model, "not a whole cache file")


def test_a_missing_file_or_a_folder_is_refused(saved, model, tmp_path):
    _, plan = saved
    assert_refused(tmp_path / "nothing", plan, model, "there is no cache file")
    assert_refused(tmp_path, plan, model, "not a whole cache file")


def test_another_kind_of_file_is_refused(saved, model, tmp_path):
    _, plan = saved
    text, weights = tmp_path / "notes.txt", tmp_path / "model.safetensors"
    text.write_text("a prefix computed once " * 50)
    save_file({"weight": torch.ones(3)}, weights)
    assert_refused(text, plan, model, "not a whole cache file")
    assert_refused(weights, plan, model, "not a kvloom cache")


def test_another_plan_is_refused(saved, model):
    path, _ = saved
    for plan in (
        tiny.mixed(model),
        tiny.mixed(model, window=Window(sinks=4), prefill="quantized"),
        tiny.eight_bit(model, window=Window(sinks=4)),
    ):
        assert_refused(path, plan, model, "another plan")


def test_another_model_is_refused(saved):
    path, plan = saved
    other = tiny.build("llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="num_layers"):
        LoomCache.load(path, plan, other)
    assert_refused(path, tiny.mixed(other, window=Window(sinks=4)), other, "another plan")


def test_a_damaged_header_is_refused(saved, model):
    path, plan = saved
    rewritten(path, tokens="many")
    assert_refused(path, plan, model, "how many tokens")
    rewritten(path, tokens="151")
    assert_refused(path, plan, model, "damaged")


def halved(tensors):
    for name in ("tail.key", "tail.value"):
        tensors[f"layers.1.{name}"] = tensors[f"layers.1.{name}"][:, :, ::2].contiguous()


@pytest.mark.parametrize(
    "change",
    [
        halved,
        lambda t: t.pop("layers.1.tail.key"),
        lambda t: t.pop("layers.0.pages.1"),
        lambda t: t.update({"layers.0.pages.0": t["layers.0.pages.0"].int()}),
        lambda t: t.update({"layers.0.pages.0": t["layers.0.pages.0"][:, :, :1].contiguous()}),
        lambda t: t.update({"layers.0.sinks.key": t["layers.0.sinks.key"][:, :, :2].contiguous()}),
        lambda t: t.update({"layers.0.tail.value": t["layers.0.tail.value"][:, :1].contiguous()}),
        lambda t: t.update({"layers.0.tail.key": t["layers.0.tail.key"].double()}),
        lambda t: t.update({"layers.0.tail.key": torch.zeros(3)}),
    ],
)
def test_tensors_of_other_sizes_are_refused(saved, model, change):
    path, plan = saved
    rewritten(path, change=change)
    assert_refused(path, plan, model, "damaged")


def test_where_a_plan_came_from_does_not_matter(saved, model):
    """Provenance and the ranges of its entries may differ, what is stored may not."""
    path, plan = saved
    data = json.loads(plan.model_dump_json())
    entry = data["layers"][0]
    data["layers"] = [{**entry, "layers": 0}, {**entry, "layers": 1}]
    data["provenance"] = {"solver": "by hand"}
    assert LoomCache.load(path, type(plan).model_validate(data), model).get_seq_length() == 150


def test_linear_layers_cannot_be_saved_yet(model, tmp_path):
    from transformers.cache_utils import LinearAttentionLayer

    cache = LoomCache(tiny.mixed(model), model)
    tiny.run(model, cache, tiny.prompt(20), [20])
    cache.layers[1] = LinearAttentionLayer()
    with pytest.raises(CacheError, match="layer 1 is a LinearAttentionLayer"):
        cache.save(tmp_path / "prefix")

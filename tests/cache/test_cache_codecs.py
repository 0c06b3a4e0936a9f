"""Every codec end to end: a plan names it, a model generates through it, plans and files keep its name."""

from __future__ import annotations

import pytest
import tiny
import torch

from kvloom import _extras, codecs
from kvloom.cache import LoomCache
from kvloom.codecs import _quanto
from kvloom.errors import CacheError, MissingExtraError, PlanError
from kvloom.kernels import backend
from kvloom.pages import codec_facts, page_layout
from kvloom.plan import Fingerprint, Plan, TensorSpec, Window
from kvloom.plan._validate import validated

FREE = [name for name in codecs.names() if codec_facts(name).group_size is None]


def needs(name):
    if name in _extras.EXTRAS and _extras.missing(name):
        pytest.skip(f"the extra {name} is not installed")


POINTS = tuple(i / 7.5 - 1 for i in range(16))


def plan_of(model, name, grid_of=None):
    symmetric = not codec_facts(grid_of or name).asymmetric
    codebook = POINTS if codec_facts(name).is_calibrated else None
    spec = {"codec": name, "bits": 4, "symmetric": symmetric, "codebook": codebook}
    key = TensorSpec(**spec, grouping="per_channel", group_size=64)
    value = TensorSpec(**spec, grouping="per_token", group_size=16)
    fingerprint = Fingerprint.of(model)
    return Plan.from_specs(fingerprint, dict.fromkeys(fingerprint.packed_layers, (key, value)))


@pytest.mark.parametrize("name", FREE)
def test_a_model_generates_through_it(name, tmp_path):
    needs(name)
    model = tiny.enabled(tiny.build("llama"))
    plan = plan_of(model, name)
    plan.save(tmp_path / "kv_plan.json")
    cache = LoomCache(Plan.load(tmp_path / "kv_plan.json"), model)
    inputs = tiny.prompt(150)
    tokens = tiny.greedy(model, inputs, cache)
    assert tokens.shape[1] == 150 + 24
    assert cache.nbytes() == plan.nbytes(1, cache.get_seq_length(), torch.float32)
    again = LoomCache(plan, model)
    tiny.run(model, again, tokens[:, :-1], tiny.steps(173, 100))
    assert all(a.equal(b) for a, b in zip(tiny.codes(cache)[:1], tiny.codes(again)[:1], strict=True))
    assert f"keys 4b/ch64{'' if name == 'affine' else '/' + name}" in plan.describe()


@pytest.mark.parametrize(("grouping", "size"), [("per_token", "head_dim"), ("per_channel", 64)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_takes_keys_and_values_alike(bits, grouping, size):
    model = tiny.enabled(tiny.build("llama"))
    spec = TensorSpec(codec="lloyd", bits=bits, grouping=grouping, group_size=size, symmetric=True)
    fingerprint = Fingerprint.of(model)
    plan = Plan.from_specs(fingerprint, dict.fromkeys(fingerprint.packed_layers, (spec, spec)))
    cache = LoomCache(plan, model)
    inputs = tiny.prompt(150)
    tokens = tiny.greedy(model, inputs, cache)
    assert tokens.shape[1] == 150 + 24
    assert cache.nbytes() == plan.nbytes(1, cache.get_seq_length(), torch.float32)
    again = LoomCache(plan, model)
    tiny.run(model, again, tokens[:, :-1], tiny.steps(173, 100))
    assert all(a.equal(b) for a, b in zip(tiny.codes(cache)[:1], tiny.codes(again)[:1], strict=True))
    label = "tok-head" if grouping == "per_token" else "ch64"
    assert f"keys {bits}b/{label}/lloyd, values {bits}b/{label}/lloyd" in plan.describe()
    assert "attention reads the pages in place" in plan.describe()


@pytest.mark.parametrize("fields", [{}, {"rotation": "hadamard"}, {"pre_rope": True}])
def test_keys_in_kvmix_words(fields, tmp_path):
    model = tiny.enabled(tiny.build("llama"))
    fingerprint, inputs = Fingerprint.of(model), tiny.prompt(200)
    key = TensorSpec(codec="kvmix3", bits=3, grouping="per_channel", group_size=11, **fields)
    value = TensorSpec(bits=8, grouping="per_token", group_size="head_dim")
    plan = Plan.from_specs(fingerprint, dict.fromkeys(fingerprint.packed_layers, (key, value)), window=Window(sinks=4))
    exact = tiny.run(model, LoomCache(tiny.passthrough(model), model), inputs, tiny.steps(200, 150))
    cache, again = LoomCache(plan, model), LoomCache(plan, model)
    error = tiny.run(model, cache, inputs, tiny.steps(200, 150)) - exact
    assert 0 < float(error.norm()) < 0.5 * float(exact.norm())
    tiny.run(model, again, inputs, [61, 100, 39])
    assert all(a.equal(b) for a, b in zip(tiny.codes(cache)[:1], tiny.codes(again)[:1], strict=True))
    assert cache.nbytes() == plan.nbytes(1, 200, torch.float32)
    cache.save(tmp_path / "cache.safetensors")
    loaded = LoomCache.load(tmp_path / "cache.safetensors", plan, model)
    assert all(a.equal(b) for a, b in zip(tiny.codes(cache), tiny.codes(loaded), strict=True))
    cache.crop(-100)
    tiny.run(model, cache, inputs[:, 100:], [100])
    assert cache.get_seq_length() == 200


@pytest.mark.parametrize("name", ["clipped", "hqq", "lloyd", "nuq", "quanto"])
def test_attention_stays_near_the_exact_one(name):
    needs(name)
    model = tiny.enabled(tiny.build("llama"))
    inputs = tiny.prompt(200)
    exact = tiny.run(model, LoomCache(tiny.passthrough(model), model), inputs, tiny.steps(200, 150))
    plain, ours = (
        tiny.run(model, LoomCache(plan_of(model, codec, grid_of=name), model), inputs, tiny.steps(200, 150)) - exact
        for codec in ("affine", name)
    )
    assert 0 < float(ours.norm()) < 1.2 * float(plain.norm())


@pytest.mark.parametrize("name", FREE)
def test_outliers_are_kept_whatever_the_codec(name, tmp_path):
    needs(name)
    model = tiny.enabled(tiny.build("llama"))
    fingerprint, symmetric = Fingerprint.of(model), not codec_facts(name).asymmetric
    inputs, options = tiny.prompt(200), {"codec": name, "bits": 2, "symmetric": symmetric, "group_size": 16}
    if codec_facts(name).is_calibrated:
        options["codebook"] = (-0.9, -0.3, 0.3, 0.9)
    exact = tiny.run(model, LoomCache(tiny.passthrough(model), model), inputs, tiny.steps(200, 150))
    errors = []
    for share in (0.0, 0.1):
        key, value = (
            TensorSpec(grouping=grouping, outliers=share, **options) for grouping in ("per_channel", "per_token")
        )
        plan = Plan.from_specs(fingerprint, dict.fromkeys(fingerprint.packed_layers, (key, value)))
        cache = LoomCache(plan, model)
        errors.append(float((tiny.run(model, cache, inputs, tiny.steps(200, 150)) - exact).norm()))
        assert cache.nbytes() == plan.nbytes(1, 200, torch.float32)
    assert 0 < errors[1] < 0.9 * errors[0]
    cache.save(tmp_path / "cache.safetensors")
    again = LoomCache.load(tmp_path / "cache.safetensors", plan, model)
    assert all(a.equal(b) for a, b in zip(tiny.codes(cache), tiny.codes(again), strict=True))
    assert "with outliers first" in plan.describe()


def test_codecs_may_differ_by_side():
    model = tiny.build("llama")
    plan = Plan.uniform(model, 4, 2, value_codec="clipped", value_group_size=16)
    assert plan.codecs == ("affine", "clipped")
    cache = LoomCache(plan, tiny.enabled(model))
    tiny.run(model, cache, tiny.prompt(70), [70])
    (pages,) = cache.packed_layers[0].pages
    assert (pages.layout.key.fmt.codec, pages.layout.value.fmt.codec) == ("affine", "clipped")
    assert cache.nbytes() == Plan.uniform(model, 4, 2, value_group_size=16).nbytes(1, 70, torch.float32)


def test_a_cache_file_is_read_under_its_own_codec_only(tmp_path):
    model = tiny.enabled(tiny.build("llama"))
    cache = LoomCache(plan_of(model, "clipped"), model)
    tiny.run(model, cache, tiny.prompt(70), [70])
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(CacheError, match="another plan"):
        LoomCache.load(tmp_path / "cache.safetensors", plan_of(model, "affine"), model)


def test_an_absent_package_is_said_before_anything_is_cached(monkeypatch):
    model = tiny.build("llama")
    monkeypatch.setattr(_extras, "_found", lambda _: False)
    _quanto._library.cache_clear()
    with pytest.raises(MissingExtraError, match=r"^The quanto codec needs .*kvloom\[quanto\]"):
        LoomCache(plan_of(model, "quanto"), model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key_codec": "hadamard"}, r"field codec: codec 'hadamard' is unknown; choose one of .*clipped"),
        (
            {"key_bits": 3, "key_codec": "quanto"},
            r"field bits: bits 3 is not one of \(2, 4\), the widths that codec 'quanto'",
        ),
        ({"key_codec": "lloyd"}, r"field symmetric: symmetric is false where codec 'lloyd' never stores a zero point"),
    ],
)
def test_what_no_codec_takes_is_refused(options, says):
    with pytest.raises(PlanError, match=says):
        Plan.uniform(tiny.build("llama"), **options)


def test_non_finite_values_are_refused_or_clamped():
    model = tiny.build("llama")
    x = torch.randn(1, 2, 70, 16)
    x[0, 0, 3, 3] = torch.nan
    for nonfinite in ("error", "clamp"):
        cache = LoomCache(plan_of(model, "clipped"), tiny.enabled(model), nonfinite=nonfinite)
        if nonfinite == "error":
            with pytest.raises(CacheError, match="NaN, infinity"):
                cache.update(x, x, 0)
        else:
            cache.update(x, x, 0)
            (pages,) = cache.packed_layers[0].pages
            key, _ = backend(x.device).decode(pages.data, pages.layout, x.dtype)
            assert bool(key.isfinite().all())


def test_sixteen_bits_have_no_codec():
    model = tiny.build("llama")
    plan = Plan.uniform(model, 16, 16, key_codec="quanto")
    assert plan.codecs == ()
    fmt = plan.spec(0).key.format(16)
    assert page_layout(fmt, fmt, 16).is_readable


def bytes_of(plan, model, max_tokens):
    cache = LoomCache(plan, model, max_tokens=max_tokens)
    tiny.run(model, cache, tiny.prompt(150), [150])
    return cache.nbytes()


def test_a_codebook_is_part_of_what_a_layer_keeps(tmp_path):
    model = tiny.enabled(tiny.build("llama"))
    plan, plain = plan_of(model, "nuq"), plan_of(model, "affine")
    for cache in (LoomCache(plan, model), LoomCache(plan, model, max_tokens=200)):
        tiny.run(model, cache, tiny.prompt(150), tiny.steps(150, 130))
        kept = [x for name, x in cache.packed_layers[0].tensors() if name.startswith("codebooks.")]
        assert [x.tolist() for x in kept] == [list(plan.spec(0).key.format(16).points)] * 2
        assert cache.nbytes() == bytes_of(plain, model, cache.max_tokens) + 2 * 2 * 16 * 2
        cache.save(tmp_path / "cache.safetensors")
        again = LoomCache.load(tmp_path / "cache.safetensors", plan, model)
        assert all(a.equal(b) for a, b in zip(tiny.codes(again), tiny.codes(cache), strict=True))
    other = Plan.model_validate_json(plan.to_json().replace("-0.6", "-0.61"))
    with pytest.raises(CacheError, match="another plan"):
        LoomCache.load(tmp_path / "cache.safetensors", other, model)


def test_a_plan_without_its_codebooks_is_refused_before_anything_is_cached():
    model = tiny.build("llama")
    plan = Plan.uniform(model, 4, 3, value_codec="nuq", value_group_size=16)
    assert plan.nbytes(1, 10) == Plan.uniform(model, 4, 3, value_group_size=16).nbytes(1, 10) + 2 * 2 * 8
    with pytest.raises(PlanError, match=r"^layers 0-1: value.codebook is missing, .*run `kvloom calibrate`"):
        LoomCache(plan, model)
    assert "value.codebook is missing" in plan.describe()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"codec": "nuq", "bits": 2, "codebook": (-1, 0, 1)}, "key.codebook: codebook needs 4 rising numbers"),
        ({"codec": "nuq", "bits": 2, "codebook": (-1, 0.5, 0, 1)}, "codebook needs 4 rising numbers"),
        ({"codec": "nuq", "bits": 2, "codebook": (-1, 0, 0.5, 1.5)}, "numbers between -1 and 1 for 2 bits"),
        ({"codec": "nuq", "bits": 2, "codebook": (-1, 0, 0.5, float("nan"))}, "codebook needs 4"),
        ({"codec": "affine", "bits": 2, "codebook": (-1, 0, 0.5, 1)}, "codebook is not for codec 'affine'"),
        ({"codec": "lloyd", "bits": 2, "symmetric": True, "codebook": (-1, 0, 0.5, 1)}, "is not for codec 'lloyd'"),
        ({"codec": "nuq", "bits": 16, "codebook": (-1, 0, 0.5, 1)}, "codebook has no meaning for 16 bits"),
        ({"codec": "nuq", "bits": 5}, r"bits 5 is not one of \(2, 3, 4\), the widths that codec 'nuq'"),
        ({"codec": "nuq", "bits": 4, "symmetric": True}, "symmetric is not for codec 'nuq'"),
        ({"codec": "lloyd", "bits": 8, "symmetric": True}, r"bits 8 is not one of \(1, 2, 3, 4\)"),
    ],
)
def test_codebooks_that_no_plan_takes(fields, says):
    spec = {"grouping": "per_token", **fields}
    shape = {"architecture": "X", "num_layers": 1, "packed_layers": 0, "num_kv_heads": 1, "head_dim": 64}
    plan = {"model": shape, "layers": [{"layers": 0, "key": spec, "value": spec}]}
    with pytest.raises(PlanError, match=says):
        validated(Plan, plan, "the plan")

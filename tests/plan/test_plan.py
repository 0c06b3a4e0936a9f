"""The plan: exact bytes, errors that name the field, files that come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import ModelError, PlanError
from kvloom.plan import (
    Fingerprint,
    HeadPlan,
    LayerPlan,
    Plan,
    TensorSpec,
    Window,
    format_layers,
    parse_layers,
    plan_schema,
)

MODEL = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=4,
    packed_layers=(0, 1, 2, 3),
    num_kv_heads=2,
    head_dim=128,
    dtype="float16",
)


def test_bytes_of_the_documented_page() -> None:
    plan = Plan.uniform(MODEL, 4, 4)
    assert plan.nbytes(1, 64) == 4 * 2 * 8960
    assert plan.nbytes(3, 64 * 10) == 3 * 10 * 4 * 2 * 8960
    assert plan.true_bits(64) == pytest.approx(4.375)
    assert plan.nbytes(1, 63) == 4 * 2 * 63 * 128 * 2 * 2  # a page that is not full stays exact


def test_windows_and_dtype_count() -> None:
    window = Window(sinks=4, recent=32)
    plan = Plan.uniform(MODEL, 2, 2, window=window)
    pages = (1000 - 4 - 32) // 64
    exact = 1000 - 64 * pages
    assert plan.nbytes(2, 1000) == 2 * 4 * 2 * (pages * 4864 + exact * 2 * 128 * 2)
    assert plan.nbytes(2, 1000, "float32") == 2 * 4 * 2 * (pages * 4864 + exact * 2 * 128 * 4)
    ratio = Plan.uniform(MODEL, 2, 2, window=Window(recent_ratio=0.2))
    kept = 1000 - 64 * ((1000 - 200) // 64)
    assert ratio.nbytes(1, 1000) == 4 * 2 * ((1000 - kept) // 64 * 4864 + kept * 512)


def test_per_head_overrides_count() -> None:
    entry = {
        "layers": "0-3",
        "key": {"bits": 2, "grouping": "per_channel"},
        "value": {"bits": 2, "grouping": "per_token", "group_size": "head_dim"},
        "heads": {"1": {"key": {"bits": 4, "grouping": "per_channel", "group_size": 128}}},
    }
    plan = Plan.model_validate({"model": MODEL, "layers": [entry]})
    key2, value2, key4 = (128 * 128 * b // 8 + p for b, p in ((2, 128 * 2 * 4), (2, 128 * 4), (4, 128 * 4)))
    assert plan.nbytes(1, 128) == 4 * (key2 + value2 + key4 + value2)


K2, K4 = (TensorSpec(bits=bits, grouping="per_channel") for bits in (2, 4))
V2, V4 = (TensorSpec(bits=bits, grouping="per_token", group_size="head_dim") for bits in (2, 4))


def test_heads_say_what_differs_from_the_commonest_pair() -> None:
    model = MODEL.model_copy(update={"num_kv_heads": 3})
    heads = {0: [(K4, V2), (K2, V2), (K2, V2)], 1: [(K2, V2)] * 3, 2: [(K4, V4), (K2, V2), (K2, V2)], 3: [(K2, V2)] * 3}
    plan = Plan.from_head_specs(model, heads, window=Window(sinks=4))
    assert [entry.layers for entry in plan.layers] == [0, "1,3", 2]
    assert [entry.heads for entry in plan.layers] == [{0: HeadPlan(key=K4)}, {}, {0: HeadPlan(key=K4, value=V4)}]
    assert {(entry.key, entry.value) for entry in plan.layers} == {(K2, V2)}


@given(st.lists(st.tuples(st.sampled_from([K2, K4]), st.sampled_from([V2, V4])), min_size=8, max_size=8))
def test_heads_come_back(pairs: list[tuple[TensorSpec, TensorSpec]]) -> None:
    heads = {layer: pairs[2 * layer : 2 * layer + 2] for layer in range(4)}
    plan = Plan.from_head_specs(MODEL, heads)
    assert {layer: [plan.spec(layer).head(head) for head in range(2)] for layer in range(4)} == heads
    if all(one == other for one, other in heads.values()):
        assert plan == Plan.from_specs(MODEL, {layer: own[0] for layer, own in heads.items()})


def test_heads_left_out_are_named() -> None:
    with pytest.raises(PlanError, match="specs of layer 2 are of 1 KV heads: give a pair for each of 2"):
        Plan.from_head_specs(MODEL, {layer: [(K2, V2)] * (1 if layer == 2 else 2) for layer in range(4)})


def test_save_and_load(tmp_path: Path) -> None:
    plan = Plan.uniform(MODEL, 3, 2, window=Window(sinks=4), prefill="quantized")
    path = tmp_path / "kv_plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert json.loads(path.read_text())["schema_version"] == 1
    assert json.loads(path.read_text())["model"]["packed_layers"] == "0-3"


def edited(**change: object) -> dict:
    plan = json.loads(Plan.uniform(MODEL, 4, 2).model_dump_json())
    plan["layers"][0].update(change)
    return plan


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (edited(key={"bits": 7, "grouping": "per_channel"}), r"layers\.0\.key\.bits"),
        (edited(key={"bits": 4, "grouping": "per_chanel"}), r"layers\.0\.key\.grouping"),
        (edited(key={"bits": 4, "grouping": "per_channel", "group_size": "head_dim"}), "group_size 'head_dim'"),
        (edited(value={"bits": 4, "grouping": "per_token", "group_size": 256}), r"layers\[0\]: group_size 256"),
        (
            edited(key={"bits": 4, "grouping": "per_channel", "codec": "hqqq"}),
            r"layers\.0\.key\.codec: codec 'hqqq' is",
        ),
        (
            edited(key={"bits": 3, "grouping": "per_channel", "codec": "quanto"}),
            r"layers\.0\.key\.bits: bits 3 is not one",
        ),
        (
            edited(value={"bits": 4, "grouping": "per_token", "codec": "hqq", "symmetric": True}),
            r"layers\.0\.value\.symmetric: symmetric is not for codec 'hqq'",
        ),
        (
            edited(value={"bits": 4, "grouping": "per_token", "codec": "lloyd"}),
            r"layers\.0\.value\.symmetric: symmetric is false where codec 'lloyd' never stores a zero point: set it",
        ),
        (
            edited(key={"bits": 4, "grouping": "per_channel", "outliers": 0.2}),
            r"layers\.0\.key\.outliers: Input should be less than or equal to 0\.125",
        ),
        (
            edited(value={"bits": 16, "grouping": "per_token", "outliers": 0.01}),
            r"layers\.0\.value: outliers have no meaning for 16 bits",
        ),
        (
            edited(value={"bits": 4, "grouping": "per_token", "pre_rope": True}),
            r"layers\[0\]: value\.pre_rope is true and values have no rotary embedding",
        ),
        (
            edited(key={"bits": 16, "grouping": "per_token", "pre_rope": True}),
            r"layers\.0\.key: pre_rope has no meaning for 16 bits",
        ),
        (
            edited(key={"bits": 4, "grouping": "per_token", "pre_rope": True, "rotation": "hadamard"}),
            r"layers\.0\.key: pre_rope and rotation cannot both be set",
        ),
        (edited(heads={"1": {"value": {"bits": 4, "grouping": "per_token", "pre_rope": True}}}), r"value\.pre_rope is"),
        (
            edited(key={"bits": 3, "grouping": "per_channel", "codec": "kvmix3"}),
            r"layers\.0\.key: group_size 64 per_channel is not for codec 'kvmix3', whose groups are 11 tokens",
        ),
        (
            edited(value={"bits": 3, "grouping": "per_token", "codec": "kvmix3", "group_size": 11}),
            r"layers\.0\.value: group_size 11 per_token is not for codec 'kvmix3'",
        ),
        (
            edited(key={"bits": 3, "grouping": "per_channel", "codec": "kvmix3", "group_size": 11, "outliers": 0.01}),
            r"layers\.0\.key: outliers are not for codec 'kvmix3', whose groups do not fill a page",
        ),
        (
            edited(key={"bits": 3, "grouping": "per_channel", "group_size": 11}),
            r"layers\.0\.key: group_size 11 is not for codec 'affine': use one of",
        ),
        (edited(layers="0-2"), "leaves out layer 3"),
        (edited(layers="0-4"), "names layer 4"),
        (edited(layers="3-0"), r"layers\.0\.layers"),
        (edited(windows={"sinks": 4}), r"layers\.0\.windows"),
        (edited(window={"sinks": -1}), r"window\.sinks"),
        (edited(window={"recent": 4, "recent_ratio": 0.1}), "not both"),
        (edited(heads={"2": {}}), "KV head 2"),
        (edited() | {"schema_version": 2}, "schema_version"),
        (edited() | {"layers": [edited()["layers"][0], edited()["layers"][0]]}, r"already given by layers\[0\]"),
    ],
)
def test_a_wrong_plan_names_its_field(tmp_path: Path, data: dict, names: str) -> None:
    path = tmp_path / "kv_plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=names) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_cut_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(Plan.uniform(MODEL).model_dump_json()[:100])
    with pytest.raises(PlanError, match="not a JSON plan"):
        Plan.load(tmp_path / "cut.json")


def test_wrong_numbers_in_uniform_are_plan_errors() -> None:
    with pytest.raises(PlanError, match="bits"):
        Plan.uniform(MODEL, 7, 2)
    with pytest.raises(PlanError, match="at least one token"):
        Plan.uniform(MODEL).true_bits(0)


def test_another_model_is_refused_by_the_field_that_differs() -> None:
    other = MODEL.model_copy(update={"num_kv_heads": 8})
    with pytest.raises(ModelError, match="num_kv_heads = 2 and this model has 8"):
        MODEL.check(other)
    MODEL.check(MODEL.model_copy(update={"dtype": "float32"}))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_layer_ranges_come_back(layers: set[int]) -> None:
    assert parse_layers(format_layers(sorted(layers))) == tuple(sorted(layers))


@given(
    bits=st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16]), st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16])),
    tokens=st.integers(1, 5000),
)
def test_true_bits_are_bytes_over_elements(bits: tuple[int, int], tokens: int) -> None:
    plan = Plan.uniform(MODEL, *bits)
    assert plan.true_bits(tokens) == pytest.approx(8 * plan.nbytes(1, tokens) / (2 * 4 * 2 * 128 * tokens))
    assert plan.nbytes(2, tokens) == 2 * plan.nbytes(1, tokens)


def test_describe_and_labels() -> None:
    text = Plan.uniform(MODEL, 4, 2).describe(4096)
    assert "layers 0-3: keys 4b/ch64, values 2b/tok-head" in text
    assert "3.38 true bits" in text
    spec = TensorSpec(bits=3, grouping="per_token", group_size=32, symmetric=True)
    assert spec.label == "3b/tok32s"
    assert spec.model_copy(update={"codec": "clipped"}).label == "3b/tok32s/clipped"
    assert spec.model_copy(update={"codec": "lloyd", "group_size": "head_dim"}).label == "3b/tok-head/lloyd"
    assert spec.model_copy(update={"rotation": "hadamard", "outliers": 0.01}).label == "3b/tok32s/hadamard/out1%"
    assert LayerPlan(layers=0, key=spec, value=spec).head(5) == (spec, spec)


def test_keys_before_rope_are_said() -> None:
    plain = TensorSpec(bits=2, grouping="per_channel")
    before = plain.model_copy(update={"pre_rope": True})
    assert before.label == "2b/ch64/pre-rope"
    plan = Plan.from_specs(MODEL, {layer: (before if layer == 2 else plain, plain) for layer in range(4)})
    assert plan.pre_rope_layers == (2,)
    assert "attention decodes the pages of keys before RoPE first" in plan.describe()
    assert plan.nbytes(1, 640) == Plan.from_specs(MODEL, dict.fromkeys(range(4), (plain, plain))).nbytes(1, 640)
    assert Plan.model_validate_json(plan.to_json()) == plan


def test_outliers_count_and_are_said() -> None:
    plain = TensorSpec(bits=2, grouping="per_channel")
    kept = plain.model_copy(update={"outliers": 0.01})
    plans = [Plan.from_specs(MODEL, dict.fromkeys(range(4), (key, plain))) for key in (plain, kept)]
    assert plans[1].nbytes(1, 640) - plans[0].nbytes(1, 640) == 4 * 2 * 10 * 80 * 4
    assert plans[1].true_bits(6400) - plans[0].true_bits(6400) == pytest.approx(32 * 80 / 8192 / 2)
    said = "attention decodes the pages of specs with outliers first: memory is saved, speed is not"
    assert [said in plan.describe() for plan in plans] == [False, True]
    assert Plan.model_validate_json(plans[1].to_json()) == plans[1]


def test_the_published_schema_is_the_schema() -> None:
    schema = plan_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"schema_version", "model", "layers", "prefill", "tensors", "provenance"}


def test_the_published_schema_takes_layers_as_they_are_saved() -> None:
    saved = json.loads(Plan.uniform(MODEL).to_json())["model"]["packed_layers"]
    assert saved == "0-3"
    published = plan_schema()["$defs"]["Fingerprint"]["properties"]["packed_layers"]
    assert {"type": "string"} in published["anyOf"]


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("packed_layers", [0, 0, 1, 2, 3], "packed_layers are 0,0-3: name rising indices"),
        ("packed_layers", [-1, 0, 1, 2, 3], "packed_layers are -1-3: name rising indices"),
        ("packed_layers", "0-4", "from 0 to num_layers - 1 = 3"),
        ("packed_layers", "0-99999999999", "names a layer from 65536 on"),
        ("dtype", "int8", "field model.dtype: dtype 'int8'"),
        ("num_kv_heads", 10**9, "field model.num_kv_heads: Input should be less than or equal to 4096"),
    ],
)
def test_a_model_that_cannot_be_is_refused(tmp_path: Path, field: str, given: object, message: str) -> None:
    plan = json.loads(Plan.uniform(MODEL).to_json())
    plan["model"][field] = given
    path = tmp_path / "kv_plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_a_slip_in_a_range_of_layers_does_not_fill_the_memory() -> None:
    with pytest.raises(ValueError, match="names a layer from 65536 on"):
        parse_layers("0-31,30-99999999999")


def test_json_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv_plan.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(PlanError, match="is not a JSON plan"):
        Plan.load(path)


def test_what_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv_plan.json"
    text = Plan.uniform(MODEL, 4, 4).to_json()
    path.write_text(text.replace('"bits": 4', '"bits": 4, "bits": 2', 1), encoding="utf-8")
    with pytest.raises(PlanError, match=r"kv_plan.json: bits is given twice in one place"):
        Plan.load(path)


def test_bytes_in_a_dtype_nothing_computes_in_are_refused() -> None:
    with pytest.raises(PlanError, match="dtype 'int8' is not known: give one of"):
        Plan.uniform(MODEL).nbytes(1, 64, "int8")


def test_a_copy_with_other_layers_knows_them() -> None:
    model = Fingerprint(
        architecture="X", num_layers=2, packed_layers=(0, 1), num_kv_heads=1, head_dim=64, dtype="float32"
    )
    four, two = (Plan.uniform(model, bits, bits) for bits in (4, 2))
    assert four.spec(0).key.bits == 4
    assert four.model_copy(update={"layers": two.layers}).spec(0).key.bits == 2

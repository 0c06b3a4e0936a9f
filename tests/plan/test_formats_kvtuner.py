"""KVTuner: axes, groups, windows, tables of layers and heads, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.plan import (
    Evict,
    HeadPlan,
    LayerPlan,
    Plan,
    TensorSpec,
    Window,
    export_plan,
    import_plan,
)
from tests.plan.shapes import bits_of, formats_of, notes_of, shape

MODEL = shape()
TABLE = {layer: {"nbits_key": 4, "nbits_value": 2} for layer in range(4)}
KIVI = {"axis_key": 1, "axis_value": 0, "q_group_size": 32, "residual_length": 32, "asym": True}


def read(document: Any, **options: Any) -> Plan:
    return import_plan(document, "kvtuner", MODEL, **options)


def test_its_defaults_are_read_as_its_code_reads_them() -> None:
    plan = read({})
    spec = TensorSpec(bits=4, grouping="per_token", group_size=64, symmetric=True)
    assert plan.spec(3).head(1) == (spec, spec)
    assert plan.spec(0).window == Window(recent=128)
    assert plan.prefill == "exact"
    assert plan.provenance is not None
    assert plan.provenance.source == "kvtuner"
    assert "keeps 0 to 128 of the newest tokens" in notes_of(plan)
    assert "levels straddle zero" in notes_of(plan)
    assert "levels straddle zero" in " ".join(export_plan(plan, "kvtuner").notes)


def test_zero_bits_fall_back_on_nbits() -> None:
    assert bits_of(read({"nbits": 8, "nbits_value": 2})) == [(8, 2)] * 4


def test_kivi_settings_group_keys_by_channel_and_values_by_token() -> None:
    plan = read({**KIVI, "force_quant": True})
    assert plan.spec(0).key == TensorSpec(bits=4, grouping="per_channel", group_size=32)
    assert plan.spec(0).value == TensorSpec(bits=4, grouping="per_token", group_size=32)
    assert plan.spec(0).window == Window(recent=32)
    assert plan.prefill == "quantized"


def test_group_minus_one_is_the_whole_head() -> None:
    plan = read({"q_group_size": -1, "residual_length": 0, "asym": True})
    assert plan.spec(0).key == TensorSpec(bits=4, grouping="per_token", group_size="head_dim")
    assert plan.spec(0).window == Window()
    assert notes_of(plan) == ""


def test_a_group_as_large_as_an_odd_head_is_the_whole_head() -> None:
    plan = import_plan({"q_group_size": 80}, "kvtuner", shape(dim=80))
    assert plan.spec(0).key.group_size == "head_dim"


@pytest.mark.parametrize(
    ("backend", "axis", "grouping"),
    [
        ("vanilla", 0, "per_token"),
        ("vanilla", 1, "per_channel"),
        ("quanto", 0, "per_token"),
        ("quanto", -1, "per_channel"),
        ("hqq", 1, "per_token"),
    ],
)
def test_axis_means_what_the_backend_means_by_it(backend: str, axis: int, grouping: str) -> None:
    plan = read({"backend": backend, "axis_key": axis, "axis_value": axis})
    assert (plan.spec(0).key.grouping, plan.spec(0).value.grouping) == (grouping, grouping)


def test_hqqs_other_numerics_and_run_settings_are_said() -> None:
    given = {
        "backend": "hqq",
        "axis_key": 1,
        "axis_value": 1,
        "asym": False,
        "device": "cuda",
        "compute_dtype": "float16",
    }
    notes = notes_of(read(given))
    assert read(given).codecs == ("hqq",)
    assert "asym false is read by the vanilla quantiser only" in notes
    assert "device cuda is not the plan's" in notes
    assert "compute_dtype float16 is not the plan's" in notes
    assert "compute_dtype" not in notes_of(read({"compute_dtype": "torch.bfloat16"}))


def test_a_table_of_layers(tmp_path: Path) -> None:
    table = {**TABLE, 2: {"nbits_key": 8, "nbits_value": 8}}
    path = tmp_path / "layers.yaml"
    path.write_text(yaml.safe_dump(table))
    inline = read({"nbits_key": -1, "per_layer_quant": True, "per_layer_config": table})
    by_path = read({"per_layer_quant": True, "per_layer_config_path": str(path)})
    assert bits_of(inline) == [(4, 2), (4, 2), (8, 8), (4, 2)]
    assert by_path == inline
    assert "nbits 4 is not used" in notes_of(read({"nbits": 4, "per_layer_quant": True, "per_layer_config": table}))


def test_a_table_of_heads() -> None:
    heads = {0: {"nbits_key": 4, "nbits_value": 2}, 1: {"nbits_key": 8, "nbits_value": 2}}
    plan = read({**KIVI, "per_head_quant": True, "per_head_config": dict.fromkeys(range(4), heads)})
    assert [spec.bits for spec in plan.spec(1).head(0)] == [4, 2]
    assert [spec.bits for spec in plan.spec(1).head(1)] == [8, 2]
    assert plan.spec(1).heads[1].value is None
    assert plan.layers[0].layers == "0-3"


@pytest.mark.parametrize(("name", "quote"), [("layers.yaml", ""), ("layers.json", '"')])
def test_a_layer_given_twice_is_refused(tmp_path: Path, name: str, quote: str) -> None:
    path = tmp_path / name
    row = '{"nbits_key": 4, "nbits_value": 2}'
    path.write_text("{" + ", ".join(f"{quote}{layer}{quote}: {row}" for layer in (0, 1, 2, 3, 2)) + "}")
    with pytest.raises(PlanError, match=rf"{name}: 2 is given twice"):
        import_plan(path, "kvtuner-kivi", MODEL)


def test_bare_tables_need_their_scheme(tmp_path: Path) -> None:
    path = tmp_path / "Model_kivi_KVTuner4_0.yaml"
    path.write_text(yaml.safe_dump(TABLE))
    with pytest.raises(PlanError, match="kvtuner-kivi or kvtuner-pertoken"):
        import_plan(path, "kvtuner", MODEL)
    kivi = import_plan(path, "kvtuner-kivi", MODEL)
    token = import_plan(path, "kvtuner-pertoken", MODEL)
    assert (kivi.spec(0).key.label, kivi.spec(0).value.label) == ("4b/ch32", "2b/tok32/clipped")
    assert (token.spec(0).key.label, token.spec(0).value.label) == ("4b/tok-head", "2b/tok-head/clipped")
    assert "such sides are of codec clipped" in notes_of(token)
    assert (kivi.spec(0).window.recent, token.spec(0).window.recent) == (32, 0)
    with pytest.raises(PlanError, match="read a whole configuration as kvtuner"):
        import_plan({"nbits": 4}, "kvtuner-kivi", MODEL)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"nbit": 4}, r"field nbit: .*spelling"),
        ({"nbits": 7}, "nbits_key is 7"),
        ({"nbits_key": 16}, "nbits_key is 16"),
        ({"backend": "quanto", "nbits": 8}, "nbits_key is 8"),
        ({"backend": "awq"}, "field backend"),
        ({"axis_key": 2}, "axis_key is 2"),
        ({"backend": "quanto", "axis_value": 1}, "axis_value is 1 .*quanto itself"),
        ({"backend": "hqq", "axis_key": 0}, "axis_key is 0 .*strides over heads"),
        ({"q_group_size": -1, "axis_key": 1}, "q_group_size -1 .*span tokens"),
        ({"q_group_size": 48}, "q_group_size 48 does not divide head_dim 128"),
        ({"q_group_size": 8}, "q_group_size is 8"),
        ({"residual_length": -1}, "field residual_length"),
        ({"per_layer_config": TABLE}, "per_layer_config is given and per_layer_quant is false"),
        ({"per_head_quant": True}, "per_head_quant is true without a table"),
        ({"per_head_quant": True, "per_layer_quant": True}, "both true"),
        (
            {"per_layer_quant": True, "per_layer_config": TABLE, "per_layer_config_path": "x"},
            "per_layer_config and per_layer_config_path are both given",
        ),
        ({"per_layer_quant": True, "per_layer_config_path": "none.yaml"}, "cannot read none.yaml"),
        ({"per_layer_quant": True, "per_layer_config": {**TABLE, 4: TABLE[0]}}, "per_layer_config names layer 4"),
        ({"per_layer_quant": True, "per_layer_config": {0: TABLE[0]}}, "per_layer_config leaves out layer 1-3"),
        (
            {"per_layer_quant": True, "per_layer_config": {**TABLE, 1: {"nbits_key": 4, "nbits_value": 7}}},
            r"per_layer_config\.1\.nbits_value is 7",
        ),
        (
            {"per_layer_quant": True, "per_layer_config": {**TABLE, 1: {"nbits_key": 4, "nbits_value": 4, "axis": 0}}},
            r"per_layer_config\.1\.axis",
        ),
        (
            {"per_head_quant": True, "per_head_config": {i: {0: TABLE[0]} for i in range(4)}},
            r"per_head_config\.0 names heads \[0\]",
        ),
    ],
)
def test_what_cannot_be_said_names_its_field(document: dict[str, Any], names: str) -> None:
    with pytest.raises(PlanError, match=names) as caught:
        read(document)
    assert "\n" not in str(caught.value)


WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 6, 8])
ROWS = st.lists(st.tuples(WIDTHS, WIDTHS), min_size=8, max_size=8)


@given(
    bits=ROWS,
    by_head=st.booleans(),
    axes=st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])),
    size=st.sampled_from([-1, 16, 32, 64, 128]),
    recent=st.integers(0, 256),
    asym=st.booleans(),
    force=st.booleans(),
)
def test_export_then_import_is_the_same_plan(bits, by_head, axes, size, recent, asym, force) -> None:
    size = 64 if size == -1 and 1 in axes else size
    key, value = (("per_token", "per_channel")[axis] for axis in axes)

    def spec(width: int, grouping: str) -> TensorSpec:
        group = "head_dim" if size == -1 else size
        codec = "clipped" if grouping == "per_token" and width <= 2 else "affine"
        return TensorSpec(codec=codec, bits=width, grouping=grouping, group_size=group, symmetric=not asym)

    entries = []
    for layer in range(4):
        k, v = bits[2 * layer]
        other_k, other_v = bits[2 * layer + 1]
        heads = {1: HeadPlan(key=spec(other_k, key), value=spec(other_v, value))} if by_head else {}
        entries.append(
            LayerPlan(layers=layer, key=spec(k, key), value=spec(v, value), window=Window(recent=recent), heads=heads)
        )
    plan = Plan(model=MODEL, layers=tuple(entries), prefill="quantized" if force else "exact")
    again = import_plan(yaml.safe_load(export_plan(plan, "kvtuner").text), "kvtuner", MODEL)
    assert formats_of(again) == formats_of(plan)
    assert again.prefill == plan.prefill


def test_hqqs_plans_go_out_as_they_came_in() -> None:
    config = {"backend": "hqq", "axis_key": 1, "axis_value": 1, "residual_length": 0, "nbits": 2}
    plan = read(config)
    again = yaml.safe_load(export_plan(plan, "kvtuner").text)
    assert (again["backend"], again["axis_key"], again["axis_value"]) == ("hqq", 1, 1)
    assert formats_of(read(again)) == formats_of(plan)
    with pytest.raises(PlanError, match="kvtuner-pertoken means backend vanilla and this plan has hqq"):
        export_plan(read({**config, "q_group_size": -1}), "kvtuner-pertoken")
    per_channel = TensorSpec(codec="hqq", bits=4, grouping="per_channel")
    with pytest.raises(PlanError, match="grouping of keys is per_channel and the backend is hqq"):
        export_plan(Plan.from_specs(MODEL, dict.fromkeys(range(4), (per_channel, per_channel))), "kvtuner")


def test_bare_export_is_the_table_kvtuner_reads(tmp_path: Path) -> None:
    plan = import_plan(TABLE, "kvtuner-kivi", MODEL)
    assert yaml.safe_load(export_plan(plan, "kvtuner-kivi").text) == TABLE
    with pytest.raises(PlanError, match="kvtuner-pertoken means axis_key 0 and this plan has 1"):
        export_plan(plan, "kvtuner-pertoken")


KEY, VALUE = (
    TensorSpec(bits=4, grouping="per_channel", group_size=32),
    TensorSpec(bits=2, grouping="per_token", group_size=32),
)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"window": Window(sinks=4)}, r"window\.sinks"),
        ({"window": Window(recent_ratio=0.2)}, r"window\.recent_ratio"),
        ({"evict": Evict(policy="snapkv", budget=64)}, "evict is set"),
        ({"key": KEY.model_copy(update={"bits": 16})}, "bits 16"),
        ({"key": KEY.model_copy(update={"codec": "clipped"})}, "codec 'clipped'"),
        ({"key": KEY.model_copy(update={"rotation": "hadamard"})}, "rotation is set"),
        ({"key": KEY.model_copy(update={"outliers": 0.01})}, "outliers are set"),
        ({"key": KEY.model_copy(update={"pre_rope": True})}, "pre_rope is set"),
        ({"key": KEY.model_copy(update={"group_size": 64})}, "group_size of keys and values differs"),
        ({"key": KEY.model_copy(update={"symmetric": True})}, "symmetric differs"),
    ],
)
def test_what_kvtuner_cannot_say_is_refused(fields: dict[str, Any], names: str) -> None:
    fits = LayerPlan(layers="0-3", key=KEY, value=VALUE)
    export_plan(Plan(model=MODEL, layers=(fits,)), "kvtuner")
    with pytest.raises(PlanError, match=names) as caught:
        export_plan(Plan(model=MODEL, layers=(fits.model_copy(update=fields),)), "kvtuner")
    assert "\n" not in str(caught.value)


def test_windows_and_groupings_that_differ_between_layers_are_refused() -> None:
    plan = Plan.from_specs(MODEL, {i: (KEY, VALUE) if i else (VALUE, VALUE) for i in range(4)})
    with pytest.raises(PlanError, match="grouping of keys differs"):
        export_plan(plan, "kvtuner")


def test_layers_kvtuner_would_quantise_all_the_same_are_refused() -> None:
    model = shape(packed_layers=(0, 2))
    with pytest.raises(PlanError, match=r"model\.packed_layers"):
        export_plan(Plan.uniform(model), "kvtuner")

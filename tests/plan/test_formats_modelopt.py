"""ModelOpt's per-layer map of schema version 1, in and out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import PlanError
from kvloom.plan import Evict, HeadPlan, Plan, TensorSpec, Window, export_plan, import_plan
from kvloom.plan.formats._modelopt import _ARCHITECTURES
from tests.plan.shapes import bits_of, notes_of, shape

MODEL = shape()
MAP = {
    "model.layers.0.self_attn": "FP8",
    "model.layers.1.self_attn": "NVFP4",
    "model.layers.3.self_attn": "FP8_K_NVFP4_V",
}


def config(layers: dict[str, str] = MAP, **fields: Any) -> dict[str, Any]:
    return {
        "producer": {"name": "modelopt", "version": "test"},
        "quantization": {
            "kv_cache_quant_algo": "MIXED_PRECISION",
            "kv_cache_quantized_layers": {name: {"quant_algo": algo} for name, algo in layers.items()},
            "kv_cache_schema_version": 1,
            **fields,
        },
    }


def test_floats_are_refused_and_stand_ins_are_said() -> None:
    with pytest.raises(PlanError, match=r"FP8 in layers 0 is 8-bit floats .*--substitute"):
        import_plan(config(), "modelopt", MODEL)
    plan = import_plan(config(), "modelopt", MODEL, substitute=True)
    assert bits_of(plan) == [(8, 8), (4, 4), (16, 16), (8, 4)]
    assert plan.spec(1).key == TensorSpec(bits=4, grouping="per_token", group_size=16, symmetric=True)
    assert "keys 8b/tok-heads, values 8b/tok-heads instead" in notes_of(plan)


def test_an_empty_map_needs_no_substitute() -> None:
    plan = import_plan(config({}, kv_cache_quant_algo=None), "modelopt", MODEL)
    assert bits_of(plan) == [(16, 16)] * 4


def test_what_is_about_weights_is_said() -> None:
    document = config(quant_algo="FP8", quantized_layers={}, exclude_modules=["lm_head"])
    plan = import_plan(document, "modelopt", MODEL, substitute=True)
    assert "quant_algo, exclude_modules of the source are about weights" in notes_of(plan)


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (config(kv_cache_schema_version=2), r"quantization\.kv_cache_schema_version"),
        (config({"model.layers.0.self_attn": "INT2"}), r"model\.layers\.0\.self_attn\.quant_algo"),
        (config({"model.layers.7.self_attn": "FP8"}), "model.layers.7.self_attn is not one of"),
        (config({"attention": "FP8"}), "kv_cache_quantized_layers.attention does not name one layer"),
        (config({"model.layers.0.self_attn": "FP8", "model.layers.0.attn": "FP8"}), "names a layer twice"),
        (config(kv_cache_quant_algo="FP8"), "kv_cache_quant_algo FP8 and the map"),
        (config(kv_scales=1), r"quantization\.kv_scales"),
        ({"quant_method": "modelopt"}, "field quantization"),
    ],
)
def test_what_cannot_be_said_names_its_field(document: dict[str, Any], names: str) -> None:
    with pytest.raises(PlanError, match=names) as caught:
        import_plan(document, "modelopt", MODEL, substitute=True)
    assert "\n" not in str(caught.value)


WIDTHS = st.sampled_from([(8, 8), (4, 4), (8, 4), (16, 16)])


@given(widths=st.lists(WIDTHS, min_size=4, max_size=4))
def test_export_then_import_gives_every_layer_its_widths(widths: list[tuple[int, int]]) -> None:
    specs = {
        i: tuple(TensorSpec(bits=bits, grouping="per_token", group_size=64) for bits in pair)
        for i, pair in enumerate(widths)
    }
    document = json.loads(export_plan(Plan.from_specs(MODEL, specs), "modelopt", substitute=True).text)
    again = import_plan(document, "modelopt", MODEL, substitute=True)
    assert bits_of(again) == widths
    assert document["quantization"]["kv_cache_schema_version"] == 1


def test_one_algo_is_named_at_the_top() -> None:
    text = export_plan(Plan.uniform(MODEL, 8, 8), "modelopt", substitute=True).text
    quantization = json.loads(text)["quantization"]
    assert quantization["kv_cache_quant_algo"] == "FP8"
    assert next(iter(quantization["kv_cache_quantized_layers"])) == "model.layers.0.self_attn"


def changed(**fields: Any) -> Plan:
    (entry,) = Plan.uniform(MODEL, 8, 8).layers
    return Plan(model=MODEL, layers=(entry.model_copy(update=fields),))


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        (Plan.uniform(MODEL, 8, 8), "no format of ModelOpt.*--substitute"),
        (Plan.uniform(MODEL, 3, 2), "layer 0 stores keys in 3 bits and values in 2"),
        (changed(window=Window(sinks=4)), r"layers\[0\]\.window\.sinks"),
        (changed(window=Window(recent=4)), r"layers\[0\]\.window\.recent"),
        (changed(evict=Evict(policy="snapkv", budget=64)), r"layers\[0\]\.evict"),
        (changed(heads={0: HeadPlan()}), r"layers\[0\]\.heads"),
        (Plan.uniform(shape(architecture="FalconForCausalLM"), 8, 8), r"model\.architecture FalconForCausalLM"),
    ],
)
def test_what_the_map_cannot_say_is_refused(plan: Plan, names: str) -> None:
    with pytest.raises(PlanError, match=names) as caught:
        export_plan(plan, "modelopt")
    assert "\n" not in str(caught.value)


def test_a_quantised_prefill_is_said_to_be_lost() -> None:
    plan = Plan.uniform(MODEL, 8, 8, prefill="quantized")
    assert "prefill quantized has no place" in " ".join(export_plan(plan, "modelopt", substitute=True).notes)


@pytest.mark.parametrize("architecture", sorted(_ARCHITECTURES))
def test_attention_modules_have_the_name_that_is_written(architecture: str) -> None:
    kind = getattr(transformers, architecture)
    small = {"num_hidden_layers": 1, "vocab_size": 8, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    with torch.device("meta"):
        model = kind(kind.config_class(**small, intermediate_size=64, num_key_value_heads=2))
    assert any(name == "model.layers.0.self_attn" for name, _ in model.named_modules())

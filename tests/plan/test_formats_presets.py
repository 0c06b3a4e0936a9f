"""Published presets by name, KIVI, and conversion between files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from kvloom.errors import ModelError, PlanError
from kvloom.plan import (
    Fingerprint,
    Plan,
    Provenance,
    TensorSpec,
    Window,
    convert,
    export_plan,
    find_plan,
    import_plan,
    preset,
    presets,
    readable_formats,
    writable_formats,
)
from kvloom.plan.formats import _kvtuner_tables as tables
from kvloom.plan.formats._presets import BIASED_KEYS
from tests.plan.shapes import bits_of, notes_of, shape

MODEL = shape()
LLAMA, MISTRAL = "Meta-Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3"
QWEN_3B, QWEN_7B = "Qwen2.5-3B-Instruct", "Qwen2.5-7B-Instruct"

# Average of key and value bits over layers, of the files in KVTuner's repository.
AVERAGES = {
    (LLAMA, "kivi"): (3.0625, 3.25, 5.0625, 4.90625),
    (LLAMA, "pertoken"): (3.59375, 3.96875, 5.84375, 5.4375),
    (MISTRAL, "kivi"): (3.3125, 3.1875, 5.625, 4.15625),
    (MISTRAL, "pertoken"): (3.65625, 3.78125, 5.53125, 5.375),
    (QWEN_3B, "kivi"): (114 / 36, 124 / 36, 114 / 36, 148 / 36),
    (QWEN_3B, "pertoken"): (131 / 36, 4.0, 182 / 36, 185 / 36),
    (QWEN_7B, "kivi"): (110 / 28, 89 / 28, 167 / 28, 145 / 28),
    (QWEN_7B, "pertoken"): (4.0, 110 / 28, 162 / 28, 5.0),
}
PICKS = ("KVTuner4_0", "KVTuner4_1", "KVTuner6_0", "KVTuner6_1")

# What the paper (arXiv 2502.04420) calls C and a number.
PAPER = {
    f"{LLAMA}_kivi_KVTuner4_1": 3.25,
    f"{LLAMA}_kivi_KVTuner6_1": 4.91,
    f"{LLAMA}_pertoken_KVTuner4_0": 3.59,
    f"{LLAMA}_pertoken_KVTuner6_1": 5.44,
    f"{MISTRAL}_pertoken_KVTuner4_1": 3.78,
    f"{MISTRAL}_pertoken_KVTuner6_1": 5.38,
    f"{QWEN_3B}_kivi_KVTuner4_0": 3.17,
    f"{QWEN_3B}_kivi_KVTuner4_1": 3.44,
    f"{QWEN_3B}_pertoken_KVTuner4_0": 3.64,
    f"{QWEN_3B}_pertoken_KVTuner4_1": 4.00,
    f"{QWEN_3B}_pertoken_KVTuner6_0": 5.06,
    f"{QWEN_7B}_kivi_KVTuner4_0": 3.92,
    f"{QWEN_7B}_kivi_KVTuner6_0": 5.96,
    f"{QWEN_7B}_pertoken_KVTuner4_0": 4.00,
    f"{QWEN_7B}_pertoken_KVTuner6_1": 5.00,
}


def average(plan: Plan) -> float:
    bits = bits_of(plan)
    return sum(k + v for k, v in bits) / 2 / len(bits)


def kvtuner(name: str) -> Plan:
    return preset(f"kvtuner/{name}", tables.shape(tables.tables()[name][0]))


@pytest.mark.parametrize(("model", "scheme"), AVERAGES)
def test_the_averages_are_those_of_the_published_files(model: str, scheme: str) -> None:
    plans = [kvtuner(f"{model}_{scheme}_{pick}") for pick in PICKS]
    assert [average(plan) for plan in plans] == pytest.approx(AVERAGES[model, scheme])


@pytest.mark.parametrize("name", PAPER)
def test_the_averages_are_those_the_paper_names(name: str) -> None:
    assert average(kvtuner(name)) == pytest.approx(PAPER[name], abs=0.01)


def test_all_thirty_two_are_there_and_come_back_as_files() -> None:
    assert len(tables.tables()) == 32
    for name, (_, scheme) in tables.tables().items():
        text = export_plan(kvtuner(name), f"kvtuner-{scheme}").text
        assert yaml.safe_load(text) == tables.table(name)


def test_a_published_table_layer_by_layer() -> None:
    bits = bits_of(kvtuner(f"{LLAMA}_kivi_KVTuner4_1"))
    pairs = {(2, 2): {0, 4, 25, 27}, (4, 4): {1, 2, 3, 7, 29, 31}, (8, 4): {13, 17}}
    for layer, pair in enumerate(bits):
        assert layer in pairs.get(pair, set()) or (pair == (4, 2) and not any(layer in s for s in pairs.values()))


def test_a_preset_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="num_layers = 32 and this model has 4"):
        preset(f"kvtuner/{LLAMA}_kivi_KVTuner4_0", MODEL)
    with pytest.raises(ModelError, match="architecture = MistralForCausalLM"):
        preset(f"kvtuner/{MISTRAL}_kivi_KVTuner4_0", tables.shape(LLAMA))


def test_an_unknown_name_is_told_the_nearest_and_how_to_list_all() -> None:
    with pytest.raises(PlanError, match="preset 'kivi' is unknown; choose one of kivi/K2V2, kivi/K4V4") as caught:
        preset("kivi", MODEL)
    assert str(caught.value).endswith("; kvloom.plan.presets() lists all.")
    assert sum(name in str(caught.value) for name in presets()) <= 3


def test_a_plan_is_found_by_its_file_or_as_a_preset(tmp_path: Path) -> None:
    plan = preset("kivi/K4V4", MODEL)
    plan.save(tmp_path / "mine.json")
    assert find_plan(str(tmp_path / "mine.json"), MODEL) == ("mine", plan)
    assert find_plan("kivi/K4V4", MODEL) == ("kivi/K4V4", plan)
    with pytest.raises(PlanError, match=r"cannot read the plan gone\.json"):
        find_plan("gone.json", MODEL)


def test_kivis_preset() -> None:
    plan = preset("kivi/K2V2", MODEL)
    assert plan.spec(0).key == TensorSpec(bits=2, grouping="per_channel", group_size=32)
    assert plan.spec(0).value == TensorSpec(bits=2, grouping="per_token", group_size=32)
    assert plan.spec(0).window == Window(recent=128)
    assert bits_of(preset("kivi/K4V4", MODEL)) == [(4, 4)] * 4
    assert "KIVI flushes 128 keys at a time" in plan.describe()


def test_the_other_presets() -> None:
    assert preset("kvmix/2bit-paper", MODEL).spec(0).window == Window(recent=3)
    assert preset("kvmix/2bit-repository", MODEL).spec(0).window == Window(recent=7)
    assert [bits_of(preset(f"kvmix/{bits}bit-repository", MODEL))[0] for bits in (1, 4)] == [(1, 1), (4, 4)]
    assert preset("kvmix/4bit-paper", MODEL).spec(0).window == Window(recent=7)
    assert "kvmix/1bit-paper" not in presets()  # the paper has no share for it
    assert preset("kvq/K4V2", MODEL) == import_plan({}, "kvq", MODEL)
    turned = {"bits": 2, "codec": "clipped", "rotation": "hadamard"}
    ours = preset("kvloom/K2V2", MODEL).spec(3)
    assert ours.key == TensorSpec(grouping="per_channel", group_size=64, **turned)
    assert ours.value == TensorSpec(grouping="per_token", group_size="head_dim", **turned)
    assert ours.window == Window(sinks=4)


def test_keys_that_have_a_bias_are_not_turned() -> None:
    qwen = MODEL.model_copy(update={"architecture": "Qwen2ForCausalLM"})
    ours, turned = preset("kvloom/K3V3", qwen).spec(3), preset("kvloom/K3V3", MODEL).spec(3)
    assert ours.key == turned.key.model_copy(update={"rotation": None})
    assert (ours.value, ours.window) == (turned.value, turned.window)
    assert ours.value.rotation == "hadamard"


FAMILIES = {
    "Llama": False, "Mistral": False, "Qwen2": True, "Qwen3": False, "Gemma2": False, "GptOss": True, "Phi": True,
    "Phi3": False, "Glm": True, "SeedOss": True, "Starcoder2": True, "GPTNeoX": True,
}  # fmt: skip


@pytest.mark.parametrize(("family", "has_bias"), FAMILIES.items())
def test_which_keys_have_a_bias(family: str, has_bias: bool) -> None:
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=1)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    keys = ("k_proj.bias", "qkv_proj.bias", "query_key_value.bias")
    assert any(name.endswith(keys) for name, _ in model.named_parameters()) == has_bias
    assert type(model).__name__.startswith(BIASED_KEYS) == has_bias


@pytest.mark.parametrize("ratios", ["paper", "repository"])
def test_kvmixs_three_bits(ratios: str) -> None:
    plan = preset(f"kvmix/3bit-{ratios}", MODEL)
    assert plan.spec(0).key.label == "3b/ch11/kvmix3"
    assert plan.spec(0).value == TensorSpec(bits=3, grouping="per_token", group_size=32)
    assert plan.spec(0).window == Window(recent=7)  # of keys alone 2
    key_bits, value_bits = 6.0, 3 + 32 / 32
    assert plan.true_bits(2**20 + 7, "float16") == pytest.approx((key_bits + value_bits) / 2, abs=1e-3)
    said = plan.describe()
    assert "6.0 true bits, where KVmix's words take 5.8" in said
    assert "3-bit groups of 32 instead" in said
    assert "attention decodes the pages of kvmix3 first: memory is saved, speed is not" in said


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"k_bits": 2}, "field v_bits"),
        ({"k_bits": 3, "v_bits": 2}, "field k_bits"),
        ({"k_bits": 2, "v_bits": 2, "residual_length": 100}, "residual_length 100 is not a multiple"),
        ({"k_bits": 2, "v_bits": 2, "use_flash": True}, "field use_flash"),
        ({"k_bits": 2, "v_bits": 2, "group_size": 0}, "field group_size"),
    ],
)
def test_what_kivi_cannot_say_names_its_field(document: dict, names: str) -> None:
    with pytest.raises(PlanError, match=names):
        import_plan(document, "kivi", MODEL)


def test_presets_take_a_transformers_config() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert preset("kivi/K4V4", config).model == Fingerprint.of(config)


def test_formats_are_listed_and_unknown_ones_refused() -> None:
    assert set(writable_formats()) < set(readable_formats())
    with pytest.raises(PlanError, match="format 'gguf' is unknown; choose one of kivi, kvloom"):
        import_plan({}, "gguf", MODEL)
    with pytest.raises(PlanError, match="format 'kivi' is only read; write one of kvloom, kvtuner"):
        export_plan(Plan.uniform(MODEL), "kivi")


def test_own_files_pass_through_with_their_provenance(tmp_path: Path) -> None:
    plan = Plan.uniform(MODEL, 4, 2).model_copy(update={"provenance": Provenance(solver="by hand")})
    plan.save(tmp_path / "plan.json")
    assert convert(tmp_path / "plan.json", tmp_path / "again.json", MODEL) == ()
    assert Plan.load(tmp_path / "again.json") == plan
    with pytest.raises(ModelError, match="num_layers"):
        convert(tmp_path / "plan.json", tmp_path / "again.json", shape(layers=5))


def test_convert_says_each_note_once_and_keeps_it_in_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "kv_plan.json"
    notes = convert("kivi/K4V4", path, MODEL, source_format="preset")
    assert Plan.load(path).provenance == Provenance(source="kivi", notes=notes)
    assert len(notes) == 1
    notes = convert(path, tmp_path / "k.yaml", MODEL, target_format="kvtuner")
    assert len(notes) == len(set(notes)) == 2
    assert yaml.safe_load((tmp_path / "k.yaml").read_text())["residual_length"] == 128


def test_a_refused_conversion_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        convert("kivi/K2V2", tmp_path / "out.json", MODEL, source_format="preset", target_format="modelopt")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(("name", "text"), [("cut.json", '{"k_bits": 2'), ("cut.yaml", "k_bits: [2")])
def test_a_cut_file_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError, match=f"{name} is cut short") as caught:
        import_plan(tmp_path / name, "kivi", MODEL)
    assert "\n" not in str(caught.value)


def test_json_and_yaml_files_hold_the_same(tmp_path: Path) -> None:
    table = {str(layer): {"nbits_key": 4, "nbits_value": 2} for layer in range(4)}
    (tmp_path / "t.json").write_text(json.dumps(table))
    assert bits_of(import_plan(tmp_path / "t.json", "kvtuner-kivi", MODEL)) == [(4, 2)] * 4
    assert "residual_length 32" in notes_of(import_plan(str(tmp_path / "t.json"), "kvtuner-kivi", MODEL))

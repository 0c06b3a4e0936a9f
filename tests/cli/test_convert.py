from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from kvloom import Plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that holds a configuration and no weights."""
    config = LlamaConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_preset_becomes_a_plan_and_says_what_differs(kvloom, model: Path, tmp_path: Path):
    target = tmp_path / "kv_plan.json"
    done = kvloom("convert", "kivi/K4V4", target, "--from", "preset", "--model", model)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote {target}\n"
    assert "note: residual_length 128" in done.stderr
    assert Plan.load(target).spec(1).key.label == "4b/ch32"


def test_a_table_becomes_a_plan_and_a_table_again(kvloom, model: Path, tmp_path: Path):
    table = {layer: {"nbits_key": 4, "nbits_value": 2} for layer in range(2)}
    source, plan, back = tmp_path / "t.yaml", tmp_path / "p.json", tmp_path / "b.yaml"
    source.write_text(yaml.safe_dump(table))
    assert kvloom("convert", source, plan, "--from", "kvtuner-kivi", "--model", model).exit_code == 0
    assert kvloom("convert", plan, back, "--to", "kvtuner-kivi", "--model", model).exit_code == 0
    assert yaml.safe_load(back.read_text()) == table


def test_substitutes_are_taken_only_when_asked(kvloom, model: Path, tmp_path: Path):
    plan, target = tmp_path / "p.json", tmp_path / "hf_quant_config.json"
    Plan.uniform(LlamaConfig.from_pretrained(model), 8, 4).save(plan)
    words = ["convert", plan, target, "--to", "modelopt", "--model", model]
    refused = kvloom(*words)
    assert refused.exit_code == 2
    assert "--substitute" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not target.exists()
    assert kvloom(*words, "--substitute").exit_code == 0
    assert "FP8_K_NVFP4_V" in target.read_text()


def test_an_unknown_preset_or_model_is_one_line(kvloom, model: Path, tmp_path: Path):
    unknown = kvloom("convert", "kivi", tmp_path / "p.json", "--from", "preset", "--model", model)
    assert unknown.stderr.startswith("error: preset 'kivi' is unknown; choose one of kivi/K2V2")
    absent = kvloom("convert", "kivi/K2V2", tmp_path / "p.json", "--from", "preset", "--model", tmp_path / "none")
    assert absent.exit_code == 2
    assert absent.stderr.count("\n") == 1

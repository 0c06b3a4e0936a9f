"""The demo: plans at equal bytes, and the whole path on small sizes."""

from __future__ import annotations

import json

import pytest

from kvloom.assets import CALIBRATION, EVALUATION
from kvloom.demo import KVMIX, SINKS, UNIFORM, Sizes, exact_name, lineup, nominal_bits, run_demo
from kvloom.plan import Fingerprint, Plan, Window
from kvloom.signals import Calibration, GradientNorms, LossTable, Profile, default_specs

LAYERS = 10
MODEL = Fingerprint(
    architecture="Tiny",
    num_layers=LAYERS,
    packed_layers=tuple(range(LAYERS)),
    num_kv_heads=3,
    head_dim=64,
    dtype="float32",
)


def profile(window: Window | None = None) -> Profile:
    keys, values = default_specs(64)
    loss = [[(layer + 1) * 4.0**-spec.bits for spec in keys] for layer in range(LAYERS)]
    norms = [float(layer) for layer in range(LAYERS)]
    return Profile(
        model=MODEL,
        gradient=GradientNorms(key=norms, value=norms, key_spread=norms, value_spread=norms),
        table=LossTable(
            model=MODEL,
            window=window or Window(),
            layers=list(range(LAYERS)),
            key_specs=keys,
            value_specs=values,
            key_loss=loss,
            value_loss=loss,
            key_spread=loss,
            value_spread=loss,
        ),
        calibration=Calibration(sha256="0" * 64, texts=[], prompts=1, tokens=64, seed=0),
        seconds=1.0,
    )


def test_every_plan_meets_an_exact_one_of_no_more_bytes():
    entries = {entry.name: entry for entry in lineup(profile(), 1024)}
    assert len(entries) == 2 * (len(UNIFORM) + 1)
    rivals = [entry for entry in entries.values() if entry.method != "exact"]
    assert {entry.name for entry in rivals} >= {"uniform K2V2", "uniform K6V5", KVMIX}
    for rival in rivals:
        bits = rival.plan.true_bits(1024, "bfloat16")
        exact = entries[exact_name(nominal_bits(rival.plan))]
        assert exact.target_bits == pytest.approx(bits, abs=0.01)
        size = exact.plan.nbytes(1, 1024, "bfloat16")
        assert 0.97 < size / rival.plan.nbytes(1, 1024, "bfloat16") <= 1
    targets = [round(entry.target_bits, 2) for entry in rivals if entry.target_bits]
    assert targets == [2.5, 3, 3.5, 4.5, 6]


def test_plans_of_equal_bytes_share_an_exact_plan():
    entries = lineup(profile(), 1024, ((3, 3), (4, 2)))
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)) == 5
    assert len({entry.file_name for entry in entries}) == 5


def test_sinks_cost_no_bytes_at_the_usual_length():
    entries = {entry.name: entry for entry in lineup(profile(Window(sinks=4)), 1028)}
    assert len(entries) == len(UNIFORM) * 3 + 2
    for key_bits, value_bits in UNIFORM:
        bare = entries[f"uniform K{key_bits}V{value_bits}"]
        sinks = entries[bare.name + SINKS]
        exact = entries[exact_name(bare.target_bits)]
        sizes = [entry.plan.nbytes(1, 1028, "bfloat16") for entry in (bare, sinks, exact)]
        assert sizes[0] == sizes[1] >= sizes[2] > 0.97 * sizes[0]
        assert [entry.plan.spec(0).window.sinks for entry in (bare, sinks, exact)] == [0, 4, 4]
        assert bare.target_bits == sinks.target_bits == exact.target_bits
    assert entries[KVMIX].plan.spec(0).window.sinks == 0
    assert "uniform-k2v2-sinks.json" in {entry.file_name for entry in entries.values()}


def test_calibration_and_scoring_texts_are_disjoint():
    assert not set(CALIBRATION) & set(EVALUATION)


@pytest.fixture
def tiny_folder(smollm2, tmp_path):
    """A random model of ten layers that reads the packaged model's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = smollm2
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=10,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.2,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_whole_path(tiny_folder, tmp_path, monkeypatch):
    """Small sizes, no peers: what is written and what the reader is told."""
    from kvloom.evaluate import Peers

    monkeypatch.setattr("kvloom.demo._run.peer_contestants", lambda model: Peers((), ("No peers here.",)))
    sizes = Sizes(
        windows=1,
        window=260,
        prompts=2,
        prompt_tokens=128,
        decode_context=64,
        decode_steps=2,
        sample_tokens=4,
    )
    demo = run_demo(tmp_path, model=tiny_folder, sizes=sizes)
    assert "exact 3.5" in demo.table
    assert "131 tokens" in demo.notes[0]
    assert demo.notes[-1] == "No peers here."
    page = demo.page.read_text(encoding="utf-8")
    assert "uniform K2V2" in page
    assert 'type="range"' in page
    plans = sorted((tmp_path / "plans").glob("*.json"))
    assert len(plans) == 17
    assert all(Plan.load(path).model.num_layers == 10 for path in plans)
    assert Profile.load(tmp_path / "profile.json").calibration.texts == list(CALIBRATION)
    lines = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "runs").glob("*.jsonl")
    }
    assert {name: len(records) for name, records in lines.items()} == {
        "signal": 1,
        "fidelity": 18,
        "decode": 18,
        "samples": 13,
        "memory": 7,
        "front": 1,
    }
    klds = {record["name"]: record["kld"]["value"] for record in lines["fidelity"]}
    assert klds["dense"] == 0
    assert klds["exact 6"] < klds["exact 2.5"]

"""The commands that run the packaged model, on as little as shows that they work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvloom import Fingerprint, Plan, Profile
from kvloom.assets import CALIBRATION, load_config
from kvloom.report import load_records
from tests.allocate.profiles import profile as small_profile

MODEL = "smollm2-135m"


@pytest.fixture
def plan(smollm2, tmp_path: Path) -> Path:
    Plan.uniform(smollm2[0], key_bits=4, value_bits=4).save(tmp_path / "k4v4.json")
    return tmp_path / "k4v4.json"


def test_profile_then_plan(kvloom, fetched, tmp_path: Path):
    profile, plan = tmp_path / "profile.json", tmp_path / "kv_plan.json"
    words = ["--prompts", "2", "--tokens", "128", "--device", "cpu", "--rotated", "--batch", "2", "-o", profile]
    done = kvloom("profile", MODEL, *words)
    assert done.exit_code == 0, done.output
    assert "30 layers measured" in done.stdout
    made = Profile.load(profile)
    assert {spec.rotation for spec in made.table.key_specs} == {None, "hadamard"}
    calibration = made.calibration
    assert (calibration.prompts, calibration.tokens) == (2, 128)
    assert calibration.texts == list(CALIBRATION)
    assert kvloom("plan", profile, "--bits", "3.5", "-o", plan).exit_code == 0
    assert 3.3 < Plan.load(plan).true_bits(8192) <= 3.5


def test_profile_with_evictions_then_plan_fewer_tokens(kvloom, fetched, tmp_path: Path):
    profile, plan = tmp_path / "profile.json", tmp_path / "kv_plan.json"
    words = ["--prompts", "1", "--tokens", "128", "--device", "cpu", "-o", profile]
    words += ["--evict", "snapkv", "--evict-prompts", "1", "--evict-tokens", "320"]
    done = kvloom("profile", MODEL, *words)
    assert done.exit_code == 0, done.output
    made = Profile.load(profile).eviction
    assert (made.policies, made.prompt, made.calibration.tokens) == (("snapkv",), 320, 448)
    assert kvloom("plan", profile, "--bits", "0.8", "--evict", "snapkv", "-o", plan).exit_code == 0
    assert Plan.load(plan).true_bits(8192) <= 0.8


def test_rotate_then_generate(kvloom, fetched, tmp_path: Path):
    preset, plan = tmp_path / "k2v2.json", tmp_path / "rotated.json"
    words = ["kvloom/K2V2", preset, "--model", MODEL, "--from", "preset"]
    assert kvloom("convert", *words).exit_code == 0
    words = ["--rotate", "--prompts", "1", "--tokens", "128", "--device", "cpu", "-o", plan]
    done = kvloom("calibrate", MODEL, "--plan", preset, *words)
    assert done.exit_code == 0, done.output
    assert "keys 2b/ch64/clipped/calibrated, values 2b/tok-head/clipped/calibrated" in done.stdout
    assert Plan.load(plan).provenance.rotations["texts"] == list(CALIBRATION)
    (tmp_path / "rotated.tensors.safetensors").rename(tmp_path / "away")
    words = ["generate", MODEL, "--plan", plan, "--device", "cpu", "--max-new-tokens", "3", "--prompt", "x" * 100]
    failed = kvloom(*words)
    assert failed.exit_code == 2
    assert "rotated.tensors.safetensors" in failed.stderr
    (tmp_path / "away").rename(tmp_path / "rotated.tensors.safetensors")
    done = kvloom(*words)
    assert done.exit_code == 0, done.output


def test_generate_through_a_plan_says_what_the_dense_cache_says(kvloom, plan: Path):
    words = ["generate", MODEL, "--device", "cpu", "--max-new-tokens", "10", "--prompt"]
    dense = kvloom(*words, "What is the capital of France?")
    packed = kvloom(*words, "What is the capital of France?", "--plan", plan)
    assert packed.exit_code == 0, packed.output
    assert "Paris" in packed.stdout
    assert packed.stdout == dense.stdout
    assert "true bits" in packed.stderr
    assert "true bits" not in dense.stderr
    for shown in (dense.stderr, packed.stderr):
        assert re.search(r"\d\.\d tokens/s \(median of \d decode steps\)", shown)


def test_calibrate_fills_in_what_generate_needs(kvloom, fetched, tmp_path: Path):
    wanted, made = tmp_path / "in.json", tmp_path / "out.json"
    Plan.uniform(Fingerprint.of(load_config(MODEL)), 4, 4, value_codec="nuq").save(wanted)
    words = ["generate", MODEL, "--device", "cpu", "--max-new-tokens", "2", "--prompt", "Hello", "--plan"]
    refused = kvloom(*words, wanted)
    assert refused.exit_code == 2
    assert "value.codebook is missing" in refused.stderr
    few = ["--prompts", "1", "--tokens", "80", "--device", "cpu"]
    done = kvloom("calibrate", MODEL, "--plan", wanted, "-o", made, *few)
    assert done.exit_code == 0, done.output
    assert len(Plan.load(made).spec(29).value.codebook) == 16
    assert kvloom(*words, made).exit_code == 0
    assert "attention reads the pages in place" in kvloom("show", made).stdout


def test_generate_raw_continues_the_prompt(kvloom, fetched):
    words = ["generate", MODEL, "--device", "cpu", "--max-new-tokens", "3", "--raw", "--prompt"]
    assert kvloom(*words, "One, two, three,").stdout.startswith(" four")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch):
    """Loading a model is a failure."""
    monkeypatch.setattr("kvloom.load_model", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["eval"], ["calibrate"]], ids=lambda words: words[0]
)
def test_a_plan_for_another_model_is_refused(kvloom, fetched, no_model, tmp_path: Path, command: list[str]):
    other = Fingerprint(
        architecture="LlamaForCausalLM",
        num_layers=2,
        packed_layers=[0, 1],
        num_kv_heads=2,
        head_dim=64,
        dtype="float16",
    )
    Plan.uniform(other).save(tmp_path / "p.json")
    failed = kvloom(command[0], MODEL, *command[1:], "--plan", tmp_path / "p.json", "--device", "cpu")
    assert failed.exit_code == 2
    assert failed.stderr.startswith(f"error: --plan {tmp_path / 'p.json'}: the plan is for num_layers = 2")
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", "--tokens", "9000"], "--tokens takes 9000 tokens, and smollm2-135m reads 8192"),
        (["profile", "--evict", "auto", "--evict-tokens", "8K"], "--evict-tokens takes 8320 tokens"),
        (["profile", "--prompts", "99999"], "99999 windows of 512 tokens were asked for"),
        (["calibrate", "--plan", "{plan}", "--tokens", "16K"], "--tokens takes 16384 tokens"),
        (["eval", "--plan", "kvloom/K4V4", "--window", "16K"], "task fidelity takes 16384 tokens"),
        (["eval", "--plan", "kvloom/K4V4", "--tasks", "needle", "--length", "9K"], "task needle takes 92"),
        (["signals", "compare", "--window", "9K"], "--window takes 9216 tokens"),
        (["signals", "compare", "--plans", "3"], "spread is 3: give at least 4 plans, or 0"),
        (["signals", "compare", "--signal", "magic"], "signal 'magic' is unknown"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused_before_the_model_is_loaded(
    kvloom, fetched, no_model, plan: Path, tmp_path: Path, words: list[str], message: str
):
    named = [word.format(plan=plan) for word in words]
    command = named[: 2 if named[0] == "signals" else 1]
    failed = kvloom(*command, MODEL, *named[len(command) :], "--device", "cpu", "-o", tmp_path / "out")
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr


def test_a_profile_of_another_model_is_refused_before_the_model_is_loaded(kvloom, fetched, no_model, tmp_path: Path):
    made = tmp_path / "p.json"
    small_profile(4).save(made)
    for words in (["plan", made, "--model", MODEL, "--max-kld", "1"], ["search", MODEL, made, "--bits", "4"]):
        failed = kvloom(*words, "-o", tmp_path / "out.json")
        assert failed.exit_code == 2
        assert "is for num_layers = 4" in failed.stderr


def test_eval_then_report(kvloom, plan: Path, tmp_path: Path):
    runs, page = tmp_path / "runs" / "x.jsonl", tmp_path / "report.html"
    words = ["--windows", "2", "--window", "256", "--device", "cpu", "-o", runs]
    done = kvloom("eval", MODEL, "--plan", plan, *words)
    assert done.exit_code == 0, done.output
    dense, packed = load_records(runs)
    assert (dense["name"], packed["name"]) == ("dense", "k4v4")
    assert dense["kld"]["value"] == 0 < packed["kld"]["value"] < 0.1
    assert packed["model"] == "SmolLM2-135M-Instruct"
    assert "k4v4" in done.stdout

    shown = kvloom("report", runs, "-o", page, "--title", "A title")
    assert shown.exit_code == 0, shown.output
    assert "k4v4" in shown.stdout
    assert "A title" in page.read_text(encoding="utf-8")


def test_signals_are_compared(kvloom, fetched, tmp_path: Path):
    out = tmp_path / "signals.jsonl"
    words = ["signals", "compare", MODEL, "--device", "cpu", "--signal", "weight_frobenius", "--signal", "state_error"]
    words += ["--plans", "4", "--equal", "0", "--windows", "1", "--window", "263", "--prompts", "1", "--tokens", "128"]
    shared = kvloom(*words, "--share", "1/2", "-o", out)
    assert shared.exit_code == 0, shared.output
    assert "share 1/2 measured" in shared.stdout
    done = kvloom(*words, "-o", out)
    assert done.exit_code == 0, done.output
    assert "weight_frobenius" in done.stdout
    assert "4 random plans" in done.stdout
    assert {record["kind"] for record in load_records(out)} == {"signal_comparison", "random_plan"}
    for text in ("2", "3/2", "a/b"):
        refused = kvloom(*words, "--share", text, "-o", out)
        assert refused.exit_code == 2
        assert "is no share" in refused.stderr

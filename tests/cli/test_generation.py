"""`kvloom bench generate` and `kvloom fit`, on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvloom.assets import SHAPES, random_model, shape_config
from kvloom.bench import _ceilings as ceilings
from kvloom.bench import _timing as timing
from kvloom.bench import fit
from kvloom.cli._run import _cache as make_cache
from kvloom.plan import Evict, Fingerprint, Plan, TensorSpec, preset

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
HERE = ["--shape", "tiny", "--device", "cpu", "--caches", "dynamic,growing,fixed", "--repeats", "1", "--new", "4"]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plan of the shape ``tiny``, in the folder where commands run."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setitem(ceilings._READ_BYTES, "cpu", 1 << 20)
    monkeypatch.chdir(tmp_path)
    Plan.uniform(Fingerprint.of(shape_config("tiny")), 4, 2).save("p.json")
    return Path("p.json")


def test_bench_generate_prints_tables_and_writes_records(kvloom, plan: Path):
    words = [*HERE, "--shapes", "B2x128,B1x70", "--plan", plan, "--plan", "kvloom/K4V4", "--output", "runs/g.jsonl"]
    done = kvloom("bench", "generate", *words)
    assert done.exit_code == 0, done.output
    shown = ("tiny, B2x128 + 4 tokens, float32", "tiny, B1x70 + 4", "p growing", "kvloom/K4V4 fixed", "× best peer")
    assert all(text in done.stdout for text in shown)
    assert done.stdout.endswith("wrote runs/g.jsonl\n")
    records = [json.loads(line) for line in Path("runs/g.jsonl").read_text().splitlines()]
    assert len(records) == 1 + 2 * 5
    assert kvloom("report", "runs", "-o", "page.html").exit_code == 0


def test_bench_generate_under_a_published_setting(kvloom, plan: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SHAPES, "llama-3.1-8b", TINY)
    words = ["--preset", "kvtuner", "--device", "cpu", "--caches", "dynamic", "--repeats", "1", "--new", "2"]
    done = kvloom("bench", "generate", *words, "--fill", "random")
    assert done.exit_code == 0, done.output
    assert "llama-3.1-8b, B64x128 + 2 tokens" in done.stdout
    assert "setting: KVTuner (arXiv 2502.04420)" in done.stdout
    as_json = kvloom("bench", "generate", *words, "--shapes", "B1x64", "--json")
    assert [record["kind"] for record in json.loads(as_json.stdout)] == ["generate_ceilings", "generate"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "llama-4"], "shape 'llama-4' is unknown; choose one of llama-2-7b"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--shapes", "8x1K"], "--shapes: cannot read '8x1K'"),
        (["--shapes", "B*x1K"], "the largest batch (B*)"),
        (["--caches", "paged"], "--caches 'paged' is unknown; choose one of"),
        (["--preset", "gear"], "--preset 'gear' is unknown; choose one of"),
        (["--dtype", "int8"], "dtype 'int8' is not known: give one of float16"),
        (["--plan", "absent.json"], "cannot read the plan absent.json"),
        (["--plan", "kvloom/K9V9"], "preset 'kvloom/K9V9' is unknown"),
        (["--plan", "p.json", "--plan", "./p.json"], "another plan is named 'p'"),
        (["--plan", "other.json"], "the plan is for num_layers = 3"),
    ],
)
def test_mistakes_of_bench_generate_are_one_line(kvloom, plan: Path, words: list[str], message: str):
    other = shape_config("tiny")
    other.num_hidden_layers = 3
    Plan.uniform(Fingerprint.of(other)).save("other.json")
    failed = kvloom("bench", "generate", *HERE, "--shapes", "B1x64", *words)
    assert failed.exit_code == 2
    assert message in failed.stderr
    assert failed.stderr.count("error: ") == 1
    assert not Path("runs").exists()


def test_a_model_or_a_shape(kvloom, plan: Path):
    for command in (["bench", "generate", "--device", "cpu"], ["fit", "--gpu", "1GiB"]):
        for model in ([], ["smollm2-135m", "--shape", "tiny"]):
            failed = kvloom(*command, *model)
            assert failed.exit_code == 2
            assert failed.stderr == "error: give a model or --shape, and not both.\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_fit_predicts_and_says_that_it_did_not_allocate(kvloom, plan: Path):
    words = ["--shape", "tiny", "--gpu", "2GiB", "--tokens", "1K", "--plan", plan, "--plan", "kivi/K2V2"]
    done = kvloom("fit", *words, "--reserve", "16MiB")
    assert done.exit_code == 0, done.output
    assert "predicted only: there is no GPU of that size here" in done.stderr
    config = shape_config("tiny")
    plans = {"p": Plan.load(plan), "kivi/K2V2": preset("kivi/K2V2", config)}
    found = fit(config, plans, memory=2 << 30, tokens=1024, dtype=torch.bfloat16, reserve=16 << 20)
    rows = [line.split() for line in done.stdout.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["uncompressed", "p", "kivi/K2V2"]
    assert [int(row[3]) for row in rows] == [row.predicted for row in found.fits]
    told = json.loads(kvloom("fit", *words, "--reserve", "16MiB", "--json").stdout)
    assert told["dtype"] == "bfloat16"
    halves = [kvloom("fit", *words, "--json", "--dtype", word).stdout for word in ("fp16", "float16", "half")]
    assert json.loads(halves[0])["dtype"] == "float16"
    assert len(set(halves)) == 1
    assert [row["predicted"] for row in told["fits"]] == [row.predicted for row in found.fits]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "80G"], "cannot read '80G'"),
        (["--gpu", "1MiB"], "the weights take"),
        (["--plan", "nope"], "preset 'nope' is unknown"),
        (["--shape", "llama-4"], "shape 'llama-4' is unknown"),
    ],
)
def test_mistakes_of_fit_are_one_line(kvloom, plan: Path, words: list[str], message: str):
    failed = kvloom("fit", "--shape", "tiny", "--gpu", "2GiB", *words)
    assert failed.exit_code == 2
    assert message in failed.stderr
    assert failed.stderr.count("error: ") == 1


def test_generate_takes_a_cache_of_fixed_size_where_it_can(plan: Path, capsys: pytest.CaptureFixture[str]):
    model = random_model("tiny", dtype=torch.float32, device=torch.device("cpu"))
    assert make_cache(Plan.load(plan), model, 100).max_tokens == 100
    assert make_cache(Plan.load(plan), model, None).max_tokens is None
    assert capsys.readouterr().err == ""
    key = TensorSpec(bits=4, grouping="per_channel", group_size=64, pre_rope=True)
    value = TensorSpec(bits=4, grouping="per_token", group_size="head_dim")
    before_rope = Plan.from_specs(Fingerprint.of(model), dict.fromkeys((0, 1), (key, value)))
    assert make_cache(before_rope, model, 100).max_tokens is None
    assert "keys before RoPE need a growing cache" in capsys.readouterr().err
    evict = Evict(policy="h2o", budget=0.5, parameters={"recent": 9})
    kept = Plan.uniform(model, 4, 4)
    kept = kept.model_copy(update={"layers": tuple(x.model_copy(update={"evict": evict}) for x in kept.layers)})
    assert make_cache(kept, model, 100).max_tokens is None
    assert "steps that policy 'h2o' watches need a growing cache" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_fit_without_a_gpu_asks_for_its_size(kvloom, plan: Path):
    failed = kvloom("fit", "--shape", "tiny")
    assert failed.exit_code == 2
    assert failed.stderr == "error: there is no GPU here: say how much memory to fill, as in --gpu 80GiB.\n"

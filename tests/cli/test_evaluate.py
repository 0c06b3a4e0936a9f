"""`kvloom eval` and `kvloom lm-eval` on a tiny random model that reads the packaged model's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvloom import Plan, _extras
from kvloom.assets import load_config
from kvloom.plan import Evict
from kvloom.report import load_records
from tests.evaluate.tasks.data import longbench_row, write_gsm8k, write_rows
from tests.evaluate.tiny_folder import save_tiny


@pytest.fixture(scope="module")
def folder(fetched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made")
    model = save_tiny(made / "tiny")
    for bits in (4, 2):
        Plan.uniform(model, bits, bits).save(made / f"k{bits}.json")
    write_gsm8k(made)
    return made


def test_many_tasks_and_plans_in_one_run(kvloom, folder: Path, tmp_path: Path):
    out = tmp_path / "eval.jsonl"
    plans = ["--plan", folder / "k4.json", "--plan", folder / "k2.json"]
    words = ["--tasks", "gsm8k,needle,longbench,fidelity", "--limit", "1", "--length", "640", "--data", folder]
    sizes = ["--windows", "1", "--window", "300", "--shots", "1", "--device", "cpu"]
    wrong = kvloom("eval", folder / "tiny", *plans, *words, *sizes, "-o", out)
    assert wrong.exit_code == 2
    assert "lcc" in wrong.stderr or "2wikimqa.jsonl" in wrong.stderr
    assert not out.exists()
    words[1] = "gsm8k, needle,fidelity"
    done = kvloom("eval", folder / "tiny", *plans, *words, *sizes, "-o", out)
    assert done.exit_code == 0, done.output
    records = load_records(out)
    assert [(record["kind"], record["name"]) for record in records] == [
        (kind, name) for kind in ("task", "needle", "fidelity") for name in ("dense", "k4", "k2")
    ]
    assert records[1]["prefill"] == "quantized"
    assert "gsm8k" in done.stdout
    assert "KLD" in done.stdout
    again = kvloom("eval", folder / "tiny", *plans[:2], *words, *sizes, "--prefill", "exact", "-o", out)
    assert again.exit_code == 0, again.output
    exact = [record for record in load_records(out) if record["name"] == "k4" and record["prefill"] == "exact"]
    assert len(exact) == 3


def test_plans_that_evict_are_scored_after_a_prompt_that_all_read_exactly(kvloom, folder: Path, tmp_path: Path):
    plan = Plan.load(folder / "k4.json")
    entry = plan.layers[0].model_copy(update={"evict": Evict(policy="snapkv", budget=0.25)})
    few = plan.model_copy(update={"layers": (entry,)})
    few.save(tmp_path / "few.json")
    out = tmp_path / "eval.jsonl"
    words = ["--plan", tmp_path / "few.json", "--plan", folder / "k2.json", "--windows", "1", "--window", "300"]
    done = kvloom("eval", folder / "tiny", *words, "--device", "cpu", "-o", out)
    assert done.exit_code == 0, done.output
    assert "all plans read prompts so" in " ".join(done.stderr.split())
    records = load_records(out)
    assert [(it["name"], it["prefill"], it["prompt"]) for it in records] == [
        ("dense", "exact", 171),
        ("few", "exact", 171),
        ("k2", "exact", 171),
    ]
    assert records[1]["true_bits"] == few.true_bits(171, torch.bfloat16) < plan.true_bits(171, torch.bfloat16)
    assert "after prompts of 171 tokens" in " ".join(done.stdout.split())


def test_what_a_group_leaves_out_is_said(kvloom, folder: Path, tmp_path: Path):
    write_rows(tmp_path / "longbench" / "lcc.jsonl", [longbench_row()])
    plan = ["--plan", folder / "k2.json", "--device", "cpu", "-o", tmp_path / "x.jsonl"]
    done = kvloom("eval", folder / "tiny", *plan, "--tasks", "longbench", "--data", tmp_path)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("is left out: There is no") == 15
    assert done.stdout.count("longbench/lcc") == 2


def test_an_unknown_task_is_one_line(kvloom, folder: Path):
    failed = kvloom("eval", folder / "tiny", "--plan", folder / "k2.json", "--tasks", "gsm9k")
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: task 'gsm9k' is unknown; choose one of gsm8k")


def test_lm_eval_without_its_extra_is_one_line(kvloom, folder: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.delitem(sys.modules, "kvloom.integrations.lm_eval", raising=False)
    monkeypatch.setattr(_extras, "_found", lambda module: module != "lm_eval")
    failed = kvloom("lm-eval", folder / "tiny", "--plan", folder / "k2.json", "--tasks", "hellaswag")
    assert failed.exit_code == 2
    assert failed.stderr == ("error: kvloom.integrations.lm_eval needs lm_eval: run pip install 'kvloom[lm-eval]'.\n")


def test_lm_eval_runs_local_tasks(kvloom, folder: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.json").write_text(json.dumps({"question": "2 and 2?", "choices": [" 4", " 5"], "label": 0}))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    out = tmp_path / "lm.jsonl"
    words = ["--plan", folder / "k2.json", "--tasks", "sums", "--include", tmp_path, "--device", "cpu", "-o", out]
    done = kvloom("lm-eval", folder / "tiny", *words)
    assert done.exit_code == 0, done.output
    records = load_records(out)
    assert [(record["task"], record["name"]) for record in records] == [
        ("lm-eval/sums", "dense"),
        ("lm-eval/sums", "k2"),
    ]
    assert "lm-eval/sums" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--plan", "kvloom/K4V4", "-o", "{tmp}"], "is a folder: name a file"),
        (["eval", "--plan", "kvloom/K4V4", "-o", "{tmp}/other.json"], "line 1 is not a JSON object"),
        (
            ["eval", "--plan", "kvloom/K4V4", "--tasks", "ruler/niah"],
            "'ruler/niah' is unknown; choose one of ruler/niah",
        ),
        (["eval", "--plan", "kvloom/K4V4", "--dtype", "fp8"], "dtype 'fp8' is not known"),
        (["calibrate", "--plan", "{tmp}/plan.json", "-o", "{tmp}"], "is a folder: name a file"),
        (["generate", "--prompt", "", "--raw"], "--prompt has no tokens: give a text"),
    ],
)
def test_mistakes_are_one_line_before_any_work(kvloom, folder: Path, tmp_path: Path, words: list[str], message: str):
    (tmp_path / "other.json").write_text("{\n}\n")
    Plan.uniform(load_config(folder / "tiny"), 4, 4).save(tmp_path / "plan.json")
    command, *options = (word.format(tmp=tmp_path) for word in words)
    done = kvloom(command, folder / "tiny", *options)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not list(tmp_path.glob("*.pieces"))


def test_presets_are_scored_and_generate_as_files_do(kvloom, folder: Path, tmp_path: Path):
    out = tmp_path / "runs" / "eval.jsonl"
    words = ["--tasks", "memory", "--plan", "kvloom/K4V4", "-o", out]
    done = kvloom("eval", folder / "tiny", *words)
    assert done.exit_code == 0, done.output
    assert {record["name"] for record in load_records(out)} == {"dense", "kvloom/K4V4"}
    done = kvloom("generate", folder / "tiny", "--plan", "kvloom/K4V4", "--prompt", "abc", "--max-new-tokens", "2")
    assert done.exit_code == 0, done.output
    assert "true bits" in done.stderr

"""`torchrun -m kvloom`: two processes on the CPU share a model; the first one prints and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvloom import Plan
from kvloom.plan import HeadPlan, TensorSpec
from kvloom.report import load_records

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent), "COLUMNS": "200"}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_the_package_runs_as_a_module():
    done = run("-m", "kvloom", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "kvloom")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a hundred words with two KV heads, a plan with a spec for each of them, and a text."""
    made = tmp_path_factory.mktemp("made")
    words = [f"word{n}" for n in range(100)]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(made / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(made / "tiny")
    plan = Plan.uniform(model, 8, 8)
    own = {1: HeadPlan(key=TensorSpec(bits=3, grouping="per_channel"))}
    by_head = plan.layers[0].model_copy(update={"heads": own})
    plan.model_copy(update={"layers": (by_head,)}).save(made / "plan.json")
    drawn = torch.randint(100, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    (made / "text.txt").write_text(" ".join(words[n] for n in drawn))
    return made


def commands(folder: Path, out: Path) -> list[list[str]]:
    model, plan = str(folder / "tiny"), ["--plan", str(folder / "plan.json")]
    sizes = ["--windows", "1", "--window", "300", "--chunk", "100", "--text", str(folder / "text.txt")]
    return [
        ["generate", model, *plan, "--prompt", "word7 " * 100, "--max-new-tokens", "8"],
        ["eval", model, *plan, *sizes, "-o", str(out / "eval.jsonl")],
        [
            *("bench", "generate", model, *plan, "--shapes", "B2x100", "--new", "4", "--repeats", "1"),
            *("--caches", "dynamic,growing,fixed", "--device", "cpu", "--output", str(out / "bench.jsonl")),
        ],
        ["bench", "generate", model, *plan, "--shapes", "B*x100", "--device", "cpu"],
        ["generate", model, *plan, "--prompt", "word", "--device", "cuda:1"],
        ["profile", model],
    ]


def test_commands_of_two_processes_say_what_one_says(folder: Path, tmp_path: Path, kvloom):
    here, there = tmp_path / "one", tmp_path / "two"
    (tmp_path / "words.json").write_text(json.dumps(commands(folder, there)))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*launch, HERE / "torchrun_worker.py", tmp_path / "words.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("codes") == 1
    assert done.stderr.count("parted: True") == 2
    assert "codes [0, 0, 0, 2, 2, 2]" in done.stdout
    generate, evaluate, bench = commands(folder, here)[:3]
    alone = [kvloom(*words) for words in ([*generate, "--device", "cpu"], [*evaluate, "--device", "cpu"], bench)]
    assert [it.exit_code for it in alone] == [0, 0, 0]
    assert alone[0].stdout.strip() in done.stdout
    assert " live bytes of this process, " in done.stderr
    messages = ("the largest batch (B*)", "device 'cuda:1' cannot be that of 2", "this command runs in one process")
    assert all(f"error: {message}" in done.stderr for message in messages)

    ours, theirs = load_records(there / "eval.jsonl"), load_records(here / "eval.jsonl")
    assert [record["name"] for record in ours] == [record["name"] for record in theirs] == ["dense", "plan"]
    assert ours[0]["device"] == "2 x cpu"
    assert [record["true_bits"] for record in ours] == [record["true_bits"] for record in theirs]
    assert ours[1]["live_bytes"] < 0.7 * theirs[1]["live_bytes"]
    assert ours[1]["kld"]["value"] == pytest.approx(theirs[1]["kld"]["value"], rel=0.05)

    cells = [record for record in load_records(there / "bench.jsonl") if record["kind"] == "generate"]
    assert [(cell["name"], cell["skipped"]) for cell in cells] == [
        (name, None) for name in ("dynamic", "plan growing", "plan fixed")
    ]
    whole = [record for record in load_records(here / "bench.jsonl") if record["kind"] == "generate"]
    for cell, one in zip(cells, whole, strict=True):
        assert (cell["world_size"], one["world_size"]) == (2, 1)
        assert cell["live_bytes"] < 0.7 * one["live_bytes"]
        assert cell["weight_bytes"] < one["weight_bytes"]
    assert cells[0]["true_bits"] == whole[0]["true_bits"] == 32
    assert {path.name for path in there.iterdir()} == {"eval.jsonl", "eval.jsonl.pieces", "bench.jsonl"}

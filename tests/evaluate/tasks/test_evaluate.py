"""The one door: tasks by name, records, runs that are killed, answers that depend on nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.errors import DataError, ModelError
from kvloom.evaluate import Settings, choose, dense_contestant, evaluate, plan_contestant, task_names
from kvloom.plan import Plan
from tests.evaluate.tasks.data import write_gsm8k
from tests.evaluate.tiny_llama import Letters, tiny_model

UNSTABLE = ("when", "seconds")
ROOT = Path(__file__).parents[3]


class Numbers(Letters):
    """Decodes to digits, so that answers hold numbers."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"{token % 10} " for token in ids)


def contestants(model, prefill="quantized"):
    plans = [
        plan_contestant(Plan.uniform(model, b, b), model, name=f"K{b}V{b}", method="uniform", prefill=prefill)
        for b in (4, 1)
    ]
    return [dense_contestant(model), *plans]


def short(data, **settings):
    """Two tasks on tiny data, answers of GSM8K of at most 24 tokens."""
    tasks = choose(["gsm8k", "needle"], Settings(shots=1, lengths=(600,), limit=3, data=data, **settings)).tasks
    tasks[0].request = replace(tasks[0].request, new_tokens=24)
    return tasks


def run(data, out=None, **options):
    model = tiny_model()
    return evaluate(
        model, Numbers(), short(data, texts=(str(data / "hay.txt"),)), contestants(model), out=out, **options
    )


def stable(records):
    return [{key: value for key, value in record.items() if key not in UNSTABLE} for record in records]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "hay.txt").write_text("Grass grows here. It is green! Is it tall? Nobody has measured it. " * 9)
    return write_gsm8k(tmp_path)


def test_records_say_what_was_asked_held_and_scored(data):
    model = tiny_model()
    records = run(data, name="tiny")
    assert [(record["kind"], record["name"]) for record in records] == [
        (kind, name) for kind in ("task", "needle") for name in ("dense", "K4V4", "K1V1")
    ]
    for record in records[:3]:
        assert record["task"] == "gsm8k"
        assert (record["total"], record["shots"], record["new_tokens"]) == (3, 1, 24)
        assert record["data"]["source"] == "test.jsonl"
        assert set(record["scores"]) == {"flexible", "strict"}
        assert record["score"] == record["scores"]["flexible"]
        assert record["score"]["value"] == sum(case["scores"]["flexible"] for case in record["cases"]) / 3
        longest = max(case["tokens"] for case in record["cases"])
        assert record["context"] == longest + 23
        assert all(len(case["answer"].split()) == 24 for case in record["cases"])
    for record, bits in zip((*records[1:3], *records[4:6]), (4, 1, 4, 1), strict=True):
        plan = Plan.uniform(model, bits, bits)
        assert record["prefill"] == "quantized"
        assert record["true_bits"] == plan.true_bits(record["context"], torch.bfloat16)
        assert record["live_bytes"] == plan.nbytes(1, record["context"], torch.float32)
    assert records[0]["prefill"] == "exact"
    assert records[0]["true_bits"] == 16
    assert records[0]["cases"] != records[2]["cases"]  # one bit is read, not the prompt
    json.dumps(records, allow_nan=False)


def test_answers_do_not_depend_on_what_else_is_asked(data):
    model = tiny_model()
    first, second = contestants(model)[1:]
    whole = evaluate(model, Numbers(), short(data, texts=(str(data / "hay.txt"),))[:1], [first, second])
    (alone,) = evaluate(model, Numbers(), short(data, texts=(str(data / "hay.txt"),))[:1], [second])
    assert stable([alone]) == stable(whole[1:])


KILLED = """
import sys
from pathlib import Path
from tests.evaluate.tasks.test_evaluate import run
run(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda what, done, total: print(what, flush=True))
"""


def test_a_run_that_is_killed_goes_on_and_ends_the_same(data, tmp_path):
    out = tmp_path / "cut.jsonl"
    pieces = tmp_path / "cut.jsonl.pieces"
    command = [sys.executable, "-c", KILLED, str(data), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        for _ in range(6):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    before = len(pieces.read_text().splitlines())
    resumed = run(data, out)
    whole = run(data, tmp_path / "whole.jsonl")
    assert stable(resumed) == stable(whole)
    assert stable(map(json.loads, out.read_text().splitlines())) == stable(whole)
    assert 5 <= before < len(pieces.read_text().splitlines()) == 3 * 3 + 3 * 3


def test_prompts_of_one_length_are_answered_together_as_each_alone(data):
    """In float64, where rounding chooses no other token."""
    model, told = tiny_model().double(), []
    needles, own = short(data, texts=(str(data / "hay.txt"),))[1:], contestants(model)
    alone = evaluate(model, Numbers(), needles, own)
    together = evaluate(model, Numbers(), needles, own, batch=2, progress=lambda *each: told.append(each[1:]))
    assert stable(together) == stable(alone)
    assert told == [(0, 9), (2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]
    with pytest.raises(DataError, match="batch is 0: answer"):
        evaluate(model, Numbers(), needles, own, batch=0)


def test_half_of_the_prompts_that_go_together_can_be_done(data, tmp_path):
    out, model = tmp_path / "cut.jsonl", tiny_model()
    needles, own = short(data, texts=(str(data / "hay.txt"),))[1:], contestants(model)
    whole = evaluate(model, Numbers(), needles, own, out=out, batch=3)
    pieces = tmp_path / "cut.jsonl.pieces"
    lines = pieces.read_text().splitlines(keepends=True)
    pieces.write_text("".join(lines[:4]))
    assert stable(evaluate(model, Numbers(), needles, own, out=out, batch=3)) == stable(whole)
    assert len(pieces.read_text().splitlines()) == len(lines) == 9


def test_fidelity_and_drift_are_reached_by_the_same_door(data):
    model = tiny_model()
    texts = (str(data / "hay.txt"),)
    chosen = choose(["fidelity", "drift"], Settings(windows=None, window=272, chunk=64, texts=texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Letters, "bos_token_id", None, raising=False)
        patch.setattr(Letters, "__call__", _as_tokenizers_are_called)
        records = evaluate(model, Letters(), chosen.tasks, contestants(model)[1:])
    assert [record["kind"] for record in records] == ["fidelity"] * 2 + ["drift"] * 2
    assert {record["windows"] for record in records} == {len("".join(Path(texts[0]).read_text())) // 272}
    assert all(record["text"]["names"] == ["hay.txt"] for record in records)
    assert records[2]["true_bits"] == records[0]["true_bits"]
    assert records[0]["kld"]["value"] < records[1]["kld"]["value"]


def test_windows_are_scored_after_a_prompt_where_asked(data):
    model = tiny_model()
    texts = (str(data / "hay.txt"),)
    chosen = choose(["fidelity"], Settings(windows=1, window=300, texts=texts, after_prompt=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Letters, "bos_token_id", None, raising=False)
        patch.setattr(Letters, "__call__", _as_tokenizers_are_called)
        (record,) = evaluate(model, Letters(), chosen.tasks, contestants(model)[:1])
    assert (record["prompt"], record["chunk"]) == (171, 1)


def _as_tokenizers_are_called(self, text, add_special_tokens=True, verbose=True):
    return type("Encoding", (), {"input_ids": [ord(letter) % 97 for letter in text]})


def test_prompts_that_the_model_cannot_read_are_refused(data):
    model = tiny_model()
    (task,) = choose(["gsm8k"], Settings(data=data)).tasks
    with pytest.raises(
        DataError, match=r"^gsm8k takes \d+ tokens of prompt and answer, and the model reads 1024: give"
    ):
        evaluate(model, Numbers(), [task], contestants(model))


def test_unknown_names_are_one_sentence_with_all_known_ones():
    with pytest.raises(
        DataError, match=r"^task 'rular' is unknown; choose one of ruler, .*drift, fidelity, gsm8k, .*\.$"
    ):
        choose(["rular"], Settings())
    assert {"ruler/vt", "longbench/lcc", "needle", "fidelity", "drift", "gsm8k", "gsm8k_multiturn"} <= set(task_names())


@pytest.mark.parametrize("lengths", [(), (1,), (4096, 0)])
def test_lengths_of_nothing_are_refused(lengths):
    with pytest.raises(DataError, match="lengths is"):
        Settings(lengths=lengths)


def test_needles_are_hidden_as_often_as_the_limit_has_room_for(data):
    texts = (str(data / "hay.txt"),)
    counts = {
        limit: len(choose(["needle"], Settings(limit=limit, lengths=(600, 700), texts=texts)).tasks[0]._cases)
        for limit in (None, 1, 6, 13)
    }
    assert counts == {None: 12, 1: 6, 6: 6, 13: 12}


def test_a_model_in_training_mode_and_two_of_one_name_are_refused(data):
    training = tiny_model().train()
    tasks = short(data, texts=(str(data / "hay.txt"),))
    with pytest.raises(ModelError, match="eval"):
        evaluate(training, Numbers(), tasks, [dense_contestant(training)])
    model = tiny_model()
    with pytest.raises(DataError, match="Two contestants"):
        evaluate(model, Numbers(), tasks, [dense_contestant(model)] * 2)

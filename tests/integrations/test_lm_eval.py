"""lm-eval through packed caches: local tasks, checked against lm-eval's own model and a plain loop."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from kvloom.cache import LoomCache, disable, enable
from kvloom.errors import DataError
from kvloom.evaluate import dense_contestant, plan_contestant
from kvloom.plan import Plan

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvloom[lm-eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402

from kvloom.integrations import lm_eval as ours  # noqa: E402
from kvloom.integrations.lm_eval import KvloomLM, harness  # noqa: E402

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: CHOICE_FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs:
  data_files: {test: CHOICE_FILE}
test_split: test
output_type: generate_until
doc_to_text: "Say: {{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs:
  data_files: {test: CHOICE_FILE}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
"""
ROWS = [
    {"question": f"Which of these words has {n} letters? " + "Think of it for a while. " * 12, "label": n % 3}
    | {"choices": [f"the word {'x' * (n + 1)}", "a longer word", f"nothing at all, {n}"]}
    for n in range(6)
]


@pytest.fixture(scope="module")
def tokenizer(fetched):
    from transformers import AutoTokenizer

    from kvloom.assets import model_dir

    return AutoTokenizer.from_pretrained(str(model_dir()))


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, tiny, and reading the packaged model's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    for text in (CHOICE, WRITE, ROLLING):
        name = text.split()[1]
        (tmp_path / f"{name}.yaml").write_text(text.replace("CHOICE_FILE", str(rows)))
    return tmp_path


@pytest.fixture
def only_local(monkeypatch):
    """Without the thousands of tasks that lm-eval comes with, whose index takes seconds."""
    monkeypatch.setattr(ours, "TaskManager", partial(TaskManager, include_defaults=False))


def packed(model, bits=1, prefill="quantized"):
    return plan_contestant(Plan.uniform(model, bits, bits), model, name=f"K{bits}", method="uniform", prefill=prefill)


class Request:
    """What lm-eval hands to a model."""

    def __init__(self, *args):
        self.args = args


def test_the_dense_cache_scores_what_lm_evals_own_model_does(model, tokenizer, folder, only_local):
    from lm_eval.models.huggingface import HFLM

    tasks = ["local_choice", "local_write", "local_rolling"]
    found = harness(model, tokenizer, tasks, [dense_contestant(model)], include=folder)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert [record["task"] for record in found] == [f"lm-eval/{task}" for task in tasks]
    for record in found:
        (_, task), metric = record["task"].split("/"), record["metric"]
        assert record["score"]["value"] == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-4)
    assert [record["metric"] for record in found] == ["acc", "exact_match", "word_perplexity"]
    assert [record["score"]["interval"] for record in found] == ["wilson", "wilson", "normal"]
    assert all((record["total"], record["true_bits"]) == (6, 16) for record in found)


def test_scored_tokens_read_the_packed_cache(model, tokenizer):
    contestant, context = packed(model), "A context of many words. " * 20
    reader = KvloomLM(model, tokenizer=tokenizer, contestant=contestant)
    ((found, _),) = reader.loglikelihood([Request(context, " and an end")])
    whole, head = (tokenizer(text).input_ids for text in (context.rstrip() + "  and an end", context.rstrip()))
    enable(model)
    cache, total = LoomCache(contestant.plan, model), 0.0
    with torch.no_grad():
        for place, token in enumerate(whole[:-1], start=1):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].double().log_softmax(-1)
            total += float(logits[whole[place]]) if place >= len(head) else 0.0
    disable(model)
    assert found == pytest.approx(total, rel=1e-4)
    ((dense, _),) = KvloomLM(model, tokenizer=tokenizer).loglikelihood([Request(context, " and an end")])
    assert abs(found - dense) > 1e-2
    assert reader.held["live_bytes"] == contestant.plan.nbytes(1, len(whole) - 1, torch.float32)


def test_a_text_longer_than_the_model_reads_loses_its_start(model, tokenizer):
    reader = KvloomLM(model, tokenizer=tokenizer, contestant=packed(model))
    long, end = "x y " * 400, "The end of it. " * 20
    both = [Request(long + end, "good"), Request(long * 2 + end, "good")]
    first, second = reader.loglikelihood(both)
    assert first == second
    assert reader.held["context"] == 256
    rolled = reader.loglikelihood_rolling([Request("word " * 600)])
    assert reader.held["context"] == 256
    assert rolled[0] < -100
    assert reader.loglikelihood([Request("", " one")])[0][0] < 0


def test_finished_requests_are_kept(model, tokenizer, folder, only_local):
    out = folder / "lm.jsonl"
    caches = [dense_contestant(model), packed(model)]
    options = {"include": folder, "limit": 3, "out": out}
    seen = []

    def stop(what, done, total):
        seen.append(what)
        if len(seen) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness(model, tokenizer, ["local_choice", "local_write"], caches, progress=stop, **options)
    pieces = folder / "lm.jsonl.pieces"
    assert len(pieces.read_text().splitlines()) == 13
    resumed = harness(model, tokenizer, ["local_choice", "local_write"], caches, **options)
    whole = harness(model, tokenizer, ["local_choice", "local_write"], caches, include=folder, limit=3)
    assert [{**record, "when": 0} for record in resumed] == [{**record, "when": 0} for record in whole]
    assert list(map(json.loads, out.read_text().splitlines())) == resumed
    assert len(pieces.read_text().splitlines()) == 2 * (3 * 3 + 3)
    assert [(record["name"], record["prefill"]) for record in resumed[:2]] == [("dense", "exact"), ("K1", "quantized")]
    assert resumed[1]["true_bits"] < resumed[0]["true_bits"] == 16


def test_lm_eval_finds_the_model_by_its_name(model, tokenizer, tmp_path):
    from lm_eval.api.registry import get_model

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Plan.uniform(model, 2, 2).save(tmp_path / "plan.json")
    arguments = f"model={tmp_path / 'model'},plan={tmp_path / 'plan.json'}"
    made = get_model("kvloom").create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    assert made.loglikelihood([Request("Some words " * 50, " more")])[0][0] < 0
    assert made.held["true_bits"] < 16
    with pytest.raises(DataError, match="batch_size is 8"):
        get_model("kvloom").create_from_arg_string(arguments, {"batch_size": 8})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"do_sample": True}, "random answers"),
        ({"temperature": 0.7}, "random answers"),
        ({"max_gen_toks": 256}, "max_gen_toks is 256, and the model reads 256"),
    ],
)
def test_answers_that_cannot_be_given_are_refused(model, tokenizer, options, match):
    with pytest.raises(DataError, match=match):
        KvloomLM(model, tokenizer=tokenizer).generate_until([Request("Say:", options)])


def test_unknown_tasks_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="lm-eval task 'hellaswagg' is unknown; choose one of hellaswag"):
        harness(model, tokenizer, ["hellaswagg"], [dense_contestant(model)])


def test_chats_are_put_in_the_template(model, tokenizer, folder, only_local):
    reader = KvloomLM(model, tokenizer=tokenizer)
    turns = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert reader.apply_chat_template(turns) == text
    (record,) = harness(
        model, tokenizer, ["local_choice"], [dense_contestant(model)], include=folder, limit=1, chat=True
    )
    assert record["chat"] is True

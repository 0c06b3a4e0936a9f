"""Fidelity after a prompt: plans that evict are scored as they decode."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from kvloom.cache import LoomCache, disable, enable
from kvloom.errors import DataError
from kvloom.evaluate import NeedleCase, Protocol, dense_contestant, drift, fidelity, needle, plan_contestant
from kvloom.evaluate._continuation import Continuations
from kvloom.evaluate.tasks import Settings, choose
from kvloom.evaluate.tasks._base import Bench
from kvloom.plan import Evict, Plan, Window
from kvloom.report import render_text
from kvloom.report._runs import group_runs
from tests.evaluate.tiny_llama import Letters, random_windows, tiny_model

PROMPT, TOKENS = 150, 230
PROTOCOL = Protocol(chunk=1, block=40, unscored=PROMPT, prompt=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def evicting(model, policy="snapkv", budget=80, bits=4, **parameters):
    plan = Plan.uniform(model, bits, bits, window=Window(sinks=4))
    evict = Evict(policy=policy, budget=budget, parameters=parameters)
    entries = tuple(entry.model_copy(update={"evict": evict}) for entry in plan.layers)
    kept = plan.model_copy(update={"layers": entries})
    return plan_contestant(kept, model, name=f"{policy} {budget} {bits}", method="evict")


@pytest.mark.parametrize(
    ("policy", "parameters"), [("streaming_llm", {}), ("h2o", {}), ("snapkv", {"window": 8}), ("key_norm", {})]
)
def test_scores_are_those_of_a_prompt_and_of_decoding_after_it(model, policy, parameters):
    """Against a loop that knows nothing of protocols; ceilings let pages go while it decodes."""
    windows, contestant = random_windows(1, TOKENS), evicting(model, policy, **parameters)
    (record,) = fidelity(model, windows, [contestant], protocol=PROTOCOL)
    cache, logits = LoomCache(contestant.plan, model), []
    with torch.no_grad():
        p = model(windows).logits[0, PROMPT:-1].double().log_softmax(-1)
        enable(model)
        model(windows[:, :PROMPT], past_key_values=cache)
        nbytes = cache.nbytes()
        for n in range(PROMPT, TOKENS - 1):
            logits.append(model(windows[:, n : n + 1], past_key_values=cache).logits[0, 0])
        disable(model)
    q = torch.stack(logits).double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 1e-3
    assert record["kld"]["value"] == pytest.approx(expected, rel=1e-4)
    assert record["scored_tokens"] == TOKENS - 1 - PROMPT
    assert record["blocks"]["tokens"] == [40, 39]
    assert record["live_bytes"] == nbytes == contestant.plan.nbytes(1, PROMPT, torch.float32)
    assert record["true_bits"] == contestant.plan.true_bits(PROMPT, torch.bfloat16)
    assert (record["prompt"], record["prefill"], record["context"]) == (PROMPT, "exact", TOKENS)


def test_what_keeps_all_and_rounds_nothing_does_not_diverge(model):
    keeps = evicting(model, budget=PROMPT, bits=16)
    windows = random_windows(2, TOKENS)
    for record in fidelity(model, windows, [dense_contestant(model), keeps], protocol=PROTOCOL):
        assert record["kld"]["value"] < 1e-9
        assert record["live_bytes"] >= 2 * 2 * 2 * 32 * PROMPT * 4
    (less,) = fidelity(model, windows, [evicting(model, bits=16)], protocol=PROTOCOL)
    assert less["kld"]["value"] > 1e-3


def test_windows_of_a_batch_score_as_they_do_alone(model):
    windows, contestants = random_windows(3, TOKENS), [evicting(model), evicting(model, "h2o")]
    alone = fidelity(model, windows, contestants, protocol=PROTOCOL)
    for one, other in zip(alone, fidelity(model, windows, contestants, protocol=PROTOCOL, batch=2), strict=True):
        assert other["blocks"]["kld"] == pytest.approx(one["blocks"]["kld"], rel=1e-3)
        assert (other["true_bits"], other["live_bytes"]) == (one["true_bits"], one["live_bytes"])


def test_a_second_run_scores_nothing_again_and_another_protocol_everything(model, tmp_path, monkeypatch):
    out, windows, contestant = tmp_path / "out.jsonl", random_windows(2, TOKENS), evicting(model)
    first = fidelity(model, windows, [contestant], protocol=PROTOCOL, out=out)
    longer = Protocol(chunk=1, block=40, unscored=PROMPT + 20, prompt=True)
    fidelity(model, windows, [contestant], protocol=longer, out=out)
    monkeypatch.setattr("kvloom.evaluate._fidelity.score_rows", None)
    again = fidelity(model, windows, [contestant], protocol=PROTOCOL, out=out)
    assert again[0]["blocks"] == first[0]["blocks"]
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


def test_drift_after_a_prompt_counts_steps_from_its_end(model):
    (record,) = drift(model, random_windows(1, TOKENS), [evicting(model)], protocol=PROTOCOL)
    assert record["steps"] == TOKENS - 1 - PROMPT


def test_eviction_needs_a_prompt_and_tokens_one_by_one(model):
    contestant = evicting(model)
    with pytest.raises(DataError, match=r"snapkv 80 4 evicts at the end of a prompt: .*prompt=True"):
        fidelity(model, random_windows(1, TOKENS), [contestant], protocol=Protocol(1, 40, 64))
    with pytest.raises(DataError, match=r"chunk is 128: .*give chunk=1"):
        Protocol(prompt=True)
    with pytest.raises(DataError, match="evicts at the end of every chunk"):
        Continuations(model, contestant)


def test_the_task_puts_a_prompt_before_the_last_block_of_a_window(model, monkeypatch):
    windows = random_windows(2, 320)
    module = import_module("kvloom.evaluate.tasks._windows")
    monkeypatch.setattr(module, "token_windows", lambda *_: windows)
    monkeypatch.setattr(module, "texts", lambda _: [])
    (task,) = choose(["fidelity"], Settings(window=320, windows=2)).tasks
    contestants = [dense_contestant(model), evicting(model)]
    records = task.run(Bench(model, None, contestants, "tiny", None, lambda *_: None))
    assert [(it["prompt"], it["chunk"], it["scored_tokens"]) for it in records] == [(191, 1, 2 * 128)] * 2
    assert records[0]["kld"]["value"] < 1e-9 < records[1]["kld"]["value"]
    plain = fidelity(model, windows, contestants[:1])
    assert plain[0]["prompt"] == 0
    assert len(group_runs([*records, {**plain[0], "model": "tiny"}])) == 2
    assert "after prompts of 191 tokens" in render_text(records)


def test_needles_are_asked_through_a_cache_that_evicts_and_bytes_count_the_answer(model):
    contestant = evicting(model, budget=0.25, bits=2)
    (record,) = needle(model, Letters(), "A sentence. Another one.", [contestant], cases=[NeedleCase(700, 0.5, 0)])
    tokens, decoded = record["context"], record["context"] - 700
    assert decoded == 15
    assert record["live_bytes"] == contestant.plan.nbytes(1, tokens, torch.float32, decoded=decoded)
    assert record["true_bits"] == contestant.plan.true_bits(tokens, torch.bfloat16, decoded=decoded)
    assert record["total"] == 1

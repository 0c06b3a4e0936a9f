"""Fidelity: the numbers, the records, resuming, and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from kvloom.cache import disable, enable
from kvloom.errors import DataError, ModelError
from kvloom.evaluate import (
    Contestant,
    Protocol,
    dense_contestant,
    fidelity,
    paired_difference,
    plan_contestant,
)
from kvloom.plan import Fingerprint, Plan, Window
from tests.evaluate.tiny_llama import VOCABULARY, random_windows, tiny_model

PROTOCOL = Protocol(chunk=64, block=64, unscored=64)
UNSTABLE = ("when", "seconds")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def k2v2(model, name="K2V2", prefill="quantized", **options) -> Contestant:
    plan = Plan.uniform(model, 2, 2, **options)
    return plan_contestant(plan, model, name=name, method="uniform", target_bits=2.5, prefill=prefill)


def stable(records):
    return [{k: v for k, v in record.items() if k not in UNSTABLE} for record in records]


class Rounding(DynamicCache):
    """A stock cache that rounds what it stores, after showing new tokens as they are."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        shown = super().update(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = layer.keys.mul(2).round() / 2, layer.values.mul(2).round() / 2
        return shown


def rounding(model) -> Contestant:
    return Contestant("rounding", "rounding", None, lambda: Rounding(config=model.config))


def test_the_dense_cache_does_not_diverge_from_itself(model):
    (record,) = fidelity(model, random_windows(2, 256), [dense_contestant(model)], protocol=PROTOCOL)
    assert record["kld"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert record["kld_p99"]["value"] == 0
    assert record["ppl_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert record["top1"]["value"] == 1
    assert record["true_bits"] == 16
    assert record["live_bytes"] == 2 * 2 * 2 * 32 * 256 * 4


def test_dense_perplexity_is_that_of_one_plain_forward_pass(model):
    windows = random_windows(2, 256)
    (record,) = fidelity(model, windows, [dense_contestant(model)], protocol=PROTOCOL)
    with torch.no_grad():
        logits = model(windows).logits.double()[:, 64:-1]
    nll = -logits.log_softmax(-1).gather(-1, windows[:, 65:, None])
    assert record["scored_tokens"] == nll.numel() == 2 * 191
    assert record["ppl"]["value"] == pytest.approx(math.exp(float(nll.mean())), rel=1e-5)


def test_scores_are_those_of_the_contestants_cache_token_by_token(model):
    """Against a loop that knows nothing of chunks of scores, blocks or pieces."""
    windows = random_windows(1, 256)
    (record,) = fidelity(model, windows, [rounding(model)], protocol=PROTOCOL)
    dense, other = DynamicCache(config=model.config), Rounding(config=model.config)
    klds = []
    with torch.no_grad():
        for start in range(0, 256, 64):
            piece = windows[:, start : start + 64]
            p = model(piece, past_key_values=dense).logits[0].double().log_softmax(-1)
            q = model(piece, past_key_values=other).logits[0].double().log_softmax(-1)
            klds.append((p.exp() * (p - q)).sum(-1))
    every = torch.cat(klds)[64:-1]
    assert record["kld"]["value"] == pytest.approx(float(every.mean()), rel=1e-5)
    assert record["kld_p99"]["value"] == pytest.approx(float(every.sort().values[189]), rel=1e-5)
    assert record["blocks"]["kld"] == pytest.approx([float(every[i : i + 64].mean()) for i in (0, 64, 128)], rel=1e-5)
    assert record["blocks"]["tokens"] == [64, 64, 63]
    assert record["prefill"] == "chunk-exact"


def test_a_plan_scores_the_same_in_any_chunks(model):
    windows = random_windows(1, 200)
    scores = [
        fidelity(model, windows, [k2v2(model)], protocol=Protocol(chunk, 32, 64))[0]["blocks"]
        for chunk in (1, 48, 64, 200)
    ]
    assert scores[0]["kld"][0] > 1e-4
    for other in scores[1:]:
        assert other["kld"] == pytest.approx(scores[0]["kld"], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_windows_of_a_batch_score_as_they_do_alone(model, batch):
    windows, contestants = random_windows(3, 256), [k2v2(model), rounding(model)]
    alone = fidelity(model, windows, contestants, protocol=PROTOCOL)
    for one, other in zip(alone, fidelity(model, windows, contestants, protocol=PROTOCOL, batch=batch), strict=True):
        assert other["kld"]["value"] == pytest.approx(one["kld"]["value"], rel=1e-3)
        assert (other["true_bits"], other["live_bytes"]) == (one["true_bits"], one["live_bytes"])
        assert (other["windows"], other["scored_tokens"]) == (3, one["scored_tokens"])


def test_a_batch_of_no_windows_is_refused(model):
    with pytest.raises(DataError, match="batch is 0"):
        fidelity(model, random_windows(1, 256), [k2v2(model)], protocol=PROTOCOL, batch=0)


@pytest.mark.parametrize("offset", [0, 4, 500])
def test_an_offset_moves_the_chunks_and_not_the_scored_tokens(model, offset):
    windows = random_windows(1, 260)
    shifted = replace(k2v2(model, prefill="exact", window=Window(sinks=4)), offset=offset)
    (record,) = fidelity(model, windows, [shifted], protocol=PROTOCOL)
    cache = shifted.make_cache()
    ends = [0, *range(64 + offset, 260, 64), 260]
    enable(model)
    with torch.no_grad():
        pieces = [model(windows[:, a:b], past_key_values=cache).logits[0] for a, b in pairwise(ends)]
        disable(model)
        p = model(windows).logits[0].double().log_softmax(-1)
    q = torch.cat(pieces).double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[64:-1].mean()
    assert record["kld"]["value"] == pytest.approx(float(expected), rel=1e-4, abs=1e-9)
    assert record["scored_tokens"] == 195
    assert record["offset"] == offset


def test_more_bits_diverge_less_and_records_hold_the_plan(model):
    contestants = [
        plan_contestant(
            Plan.uniform(model, bits, bits, window=Window(sinks=4)),
            model,
            name=f"K{bits}V{bits}",
            method="uniform",
            target_bits=float(bits),
            prefill="quantized",
        )
        for bits in (8, 4, 2)
    ]
    records = fidelity(model, random_windows(2, 256), contestants, protocol=PROTOCOL, texts=["noise"], name="tiny")
    klds = [record["kld"]["value"] for record in records]
    assert klds == sorted(klds)
    assert klds[0] < klds[2] / 20
    for record, contestant in zip(records, contestants, strict=True):
        plan = contestant.plan
        assert record["live_bytes"] == plan.nbytes(1, 256, torch.float32)
        assert record["true_bits"] == plan.true_bits(256, torch.bfloat16)
        assert record["prefill"] == "quantized"
        assert record["layers"][1]["key_bits"] == plan.spec(1).key.bits
        assert record["layers"][1]["value"] == f"{plan.spec(1).value.bits}b/tok-head"
        assert record["text"]["names"] == ["noise"]
        assert (record["model"], record["device"], record["dtype"]) == ("tiny", "cpu", "float32")
        assert record["kld"]["low"] <= record["kld"]["value"] <= record["kld"]["high"]
    json.dumps(records, allow_nan=False)


def test_attention_is_given_back(model):
    before = model.config._attn_implementation
    fidelity(model, random_windows(1, 128), [k2v2(model)], protocol=PROTOCOL)
    assert model.config._attn_implementation == before


def test_an_interrupted_run_goes_on_and_ends_the_same(model, tmp_path):
    windows = random_windows(3, 256)
    contestants = [dense_contestant(model), k2v2(model), rounding(model)]
    whole = fidelity(model, windows, contestants, protocol=PROTOCOL, out=tmp_path / "whole.jsonl")

    class Killed(Exception):
        pass

    def kill_at(limit):
        def progress(what, done, total):
            if done == limit:
                raise Killed

        return progress

    out = tmp_path / "cut.jsonl"
    for limit in (2, 5):
        with pytest.raises(Killed):
            fidelity(model, windows, contestants, protocol=PROTOCOL, out=out, progress=kill_at(limit))
        assert not out.exists()
        with (tmp_path / "cut.jsonl.pieces").open("a") as file:
            file.write('{"kind": "fidelity_pie')  # killed while writing
    scored = []
    original = torch.nn.Module.__call__

    def counted(self, *args, **kwargs):
        if self is model:
            scored.append(1)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", counted)
        resumed = fidelity(model, windows, contestants, protocol=PROTOCOL, out=out)
    assert len(scored) == 4 * (2 + 4)  # two dense references and four missing pieces
    assert stable(resumed) == stable(whole)
    assert stable(map(json.loads, out.read_text().splitlines())) == stable(whole)


def test_pieces_serve_a_longer_run_but_no_other_model_or_plan(model, tmp_path):
    out = tmp_path / "out.jsonl"
    pieces = tmp_path / "out.jsonl.pieces"

    def run(model, contestants, windows=1):
        fidelity(model, random_windows(3, 128)[:windows], contestants, protocol=PROTOCOL, out=out)
        return len(pieces.read_text().splitlines())

    assert run(model, [k2v2(model)]) == 1
    assert run(model, [k2v2(model)], windows=3) == 3
    assert run(model, [k2v2(model, window=Window(sinks=2))]) == 4
    other = tiny_model(seed=1)
    assert run(other, [k2v2(other)]) == 5
    assert run(model, [k2v2(model)]) == 5


def test_results_of_other_runs_stay_in_the_file(model, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text('{"kind": "signal", "model": "m"}\n')
    windows = random_windows(1, 128)
    for contestant in (dense_contestant(model), rounding(model), dense_contestant(model)):
        fidelity(model, windows, [contestant], protocol=PROTOCOL, out=out)
    names = [json.loads(line).get("name") for line in out.read_text().splitlines()]
    assert names == [None, "dense", "rounding"]


def test_paired_difference(model):
    windows = random_windows(3, 256)
    four = plan_contestant(Plan.uniform(model, 4, 4), model, name="K4V4", method="uniform", prefill="quantized")
    low, high = fidelity(model, windows, [four, k2v2(model)], protocol=PROTOCOL)
    compared = paired_difference(low, high)
    difference = compared["difference"]
    assert difference["value"] == pytest.approx(low["kld"]["value"] - high["kld"]["value"])
    assert difference["low"] <= difference["value"] <= difference["high"] < 0
    assert compared["ratio"]["value"] == pytest.approx(low["kld"]["value"] / high["kld"]["value"])
    assert paired_difference(high, low)["ratio"]["low"] > 1
    (elsewhere,) = fidelity(model, random_windows(3, 256, seed=9), [four], protocol=PROTOCOL)
    with pytest.raises(DataError, match="'text'"):
        paired_difference(low, elsewhere)


@pytest.mark.parametrize(
    ("windows", "match"),
    [
        (torch.zeros(0, 256, dtype=torch.int64), "at least one window"),
        (torch.zeros(256, dtype=torch.int64), r"\[windows, tokens\]"),
        (torch.zeros(1, 256), "int64"),
        (random_windows(1, 127), "at least 128 tokens"),
        (random_windows(1, 2048), "reads at most 1024"),
        (
            torch.full((1, 256), VOCABULARY),
            r"go from 97 to 97, .* vocabulary has 97 \(0 to 96\)",
        ),
        (torch.full((1, 256), -1), "from -1 to -1"),
    ],
)
def test_bad_windows_are_refused(model, windows, match):
    with pytest.raises(DataError, match=match):
        fidelity(model, windows, [dense_contestant(model)], protocol=PROTOCOL)


def test_bad_contestants_are_refused(model):
    windows = random_windows(1, 200)
    with pytest.raises(DataError, match="Two contestants are named 'dense'"):
        fidelity(model, windows, [dense_contestant(model)] * 2, protocol=PROTOCOL)
    with pytest.raises(DataError, match="no contestants"):
        fidelity(model, windows, [], protocol=PROTOCOL)
    picky = Contestant("picky", "peer", None, DynamicCache, token_multiple=64)
    with pytest.raises(DataError, match="multiples of 64 tokens only, and the window has 200"):
        fidelity(model, windows, [picky], protocol=PROTOCOL)
    with pytest.raises(DataError, match="block is 0"):
        Protocol(block=0)


def test_logits_that_are_no_numbers_are_refused():
    broken = tiny_model()
    broken.lm_head.weight.data[3] = math.nan
    with pytest.raises(DataError, match="logits of the dense cache are not finite"):
        fidelity(broken, random_windows(1, 128), [dense_contestant(broken)], protocol=PROTOCOL)


def test_a_model_in_training_mode_is_refused():
    training = tiny_model().train()
    with pytest.raises(ModelError, match="eval"):
        fidelity(training, random_windows(1, 128), [dense_contestant(training)], protocol=PROTOCOL)


def test_a_results_file_of_another_kind_is_refused(model, tmp_path):
    out = tmp_path / "notes.jsonl"
    out.write_text("dear diary\n")
    with pytest.raises(DataError, match="line 1 is not a JSON object"):
        fidelity(model, random_windows(1, 128), [dense_contestant(model)], protocol=PROTOCOL, out=out)


def test_the_packaged_model_through_a_packed_cache(smollm2):
    """Real weights: 4 bits cost little, 2 bits much more, and the control nothing."""
    model, tokenizer = smollm2
    from kvloom.assets import EVALUATION, texts, token_windows

    windows = token_windows(tokenizer, texts(EVALUATION[:3]), 256, 1, seed=0)
    shape = Fingerprint.of(model)
    contestants = [dense_contestant(model)] + [
        plan_contestant(
            Plan.uniform(shape, bits, bits),
            model,
            name=str(bits),
            method="uniform",
            prefill="quantized",
        )
        for bits in (4, 2)
    ]
    dense, four, two = fidelity(model, windows, contestants)
    assert dense["kld"]["value"] == 0
    assert 1e-4 < four["kld"]["value"] < 0.02
    assert four["kld"]["value"] * 5 < two["kld"]["value"] < 1
    assert (four["true_bits"], two["true_bits"]) == (4.5, 2.5)

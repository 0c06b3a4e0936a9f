"""Continuations: their log-likelihoods are those of token-by-token decoding through the cache."""

from __future__ import annotations

import pytest
import torch

from kvloom import codecs
from kvloom.cache import LoomCache, disable, enable
from kvloom.errors import DataError, ModelError
from kvloom.evaluate import Reader, Request, dense_contestant, fidelity, plan_contestant
from kvloom.evaluate._continuation import Continuations
from kvloom.plan import Plan
from tests.evaluate.tiny_llama import Letters, random_windows, tiny_model

TOKENS = random_windows(1, 200)[0].tolist()
CONTEXT, CONTINUATION = TOKENS[:170], TOKENS[170:]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def packed(model, bits=2, prefill="quantized"):
    return plan_contestant(Plan.uniform(model, bits, bits), model, name="packed", method="uniform", prefill=prefill)


@torch.no_grad()
def stepwise(model, cache, context, continuation):
    """Token by token, by a loop that knows nothing else."""
    total, greedy = 0.0, True
    for token, following in zip([*context, *continuation], [*context[1:], *continuation, None], strict=False):
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].double()
        seen = cache.get_seq_length()
        if len(context) <= seen < len(context) + len(continuation):
            following = continuation[seen - len(context)]
            total += float(logits.log_softmax(-1)[following])
            greedy &= int(logits.argmax()) == following
    return total, greedy


@torch.no_grad()
def test_dense_scores_are_those_of_one_plain_pass(model):
    scored = Continuations(model, dense_contestant(model), chunk=32).score(CONTEXT, CONTINUATION)
    logits = model(torch.tensor([TOKENS])).logits[0, 169:-1].double().log_softmax(-1)
    expected = logits.gather(1, torch.tensor(CONTINUATION)[:, None]).sum()
    assert scored["loglikelihood"] == pytest.approx(float(expected), rel=1e-5)
    assert scored["context"] == 199
    assert scored["true_bits"] == 16


@pytest.mark.parametrize("chunk", [1, 32, 128, 500])
def test_packed_scores_are_those_of_decoding_token_by_token(model, chunk):
    contestant = packed(model)
    scored = Continuations(model, contestant, chunk).score(CONTEXT, CONTINUATION)
    enable(model)
    total, greedy = stepwise(model, LoomCache(contestant.plan, model), CONTEXT, CONTINUATION)
    disable(model)
    assert scored["loglikelihood"] == pytest.approx(total, rel=1e-4)
    assert scored["greedy"] == greedy
    assert scored["live_bytes"] == contestant.plan.nbytes(1, 199, torch.float32)
    dense = Continuations(model, dense_contestant(model), chunk).score(CONTEXT, CONTINUATION)
    assert abs(scored["loglikelihood"] - dense["loglikelihood"]) > 1e-3  # the cache is read, not the prompt


def test_continuations_of_one_context_do_not_disturb_each_other(model):
    apart = [Continuations(model, packed(model)).score(CONTEXT, c) for c in (CONTINUATION, [3], CONTINUATION)]
    shared = Continuations(model, packed(model))
    assert [shared.score(CONTEXT, c) for c in (CONTINUATION, [3], CONTINUATION)] == apart


def test_greedy_means_every_token_is_the_most_probable(model):
    reader = Continuations(model, dense_contestant(model))
    best = max(range(97), key=lambda token: reader.score(CONTEXT, [token])["loglikelihood"])
    assert reader.score(CONTEXT, [best])["greedy"]
    assert not reader.score(CONTEXT, [best, *CONTINUATION])["greedy"]


def test_an_empty_part_is_refused(model):
    for parts in (([], [1]), ([1], [])):
        with pytest.raises(DataError, match="at least one token"):
            Continuations(model, dense_contestant(model)).score(*parts)
    assert Continuations(model, dense_contestant(model)).score([1], [2])["context"] == 1


@pytest.mark.parametrize(("context", "continuation"), [([3, 97], [4]), ([3], [4, 97]), ([3, 4], [-97])])
def test_token_ids_of_another_tokenizer_are_refused(model, context, continuation):
    """The last of a continuation is never read, only looked up in what the model says."""
    with pytest.raises(DataError, match=r"vocabulary has 97 \(0 to 96\): use the model's own tokenizer"):
        Continuations(model, packed(model)).score(context, continuation)
    with pytest.raises(DataError, match="use the model's own tokenizer"):
        Reader(model, Letters(), packed(model)).answer([*context, *continuation], Request(4))


def test_a_reader_keeps_what_it_has_done(model, tmp_path):
    out, request = tmp_path / "out.jsonl", Request(5, stop=("!",))
    first = Reader(model, Letters(), packed(model), out=out)
    assert first.held == {}
    done = [first.loglikelihood(CONTEXT, CONTINUATION), first.answer(CONTEXT, request)]
    again = Reader(model, Letters(), packed(model), out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("the model was run again"))
        assert [again.loglikelihood(CONTEXT, CONTINUATION), again.answer(CONTEXT, request)] == done
    assert again.held == first.held
    assert again.held["context"] == 199
    lines = (tmp_path / "out.jsonl.pieces").read_text().splitlines()
    assert len(lines) == 2
    Reader(model, Letters(), packed(model, bits=3), out=out).loglikelihood(CONTEXT, CONTINUATION)
    assert len((tmp_path / "out.jsonl.pieces").read_text().splitlines()) == 3


def test_an_answer_ends_before_a_stop_text(model):
    reader = Reader(model, Letters(), dense_contestant(model))
    whole = reader.answer(CONTEXT, Request(9))
    assert len(whole) == 9
    stop = whole[4:6]
    assert reader.answer(CONTEXT, Request(9, stop=(stop,))) == whole[: whole.index(stop)]
    end = Letters().text(whole[3])
    assert reader.answer(CONTEXT, Request(9, ends=(end,))) == whole[: whole.index(whole[3])]


def test_a_model_in_training_mode_is_refused():
    training = tiny_model().train()
    with pytest.raises(ModelError, match="eval"):
        Reader(training, Letters(), dense_contestant(training))


CODEC = """
from kvloom.codecs import Affine
from kvloom.pages import CodecFacts


class Mine(Affine):
    name = "mine"
    facts = CodecFacts(form="opaque", bits=(2,))

    def decode(self, encoded, fmt):
        return super().decode(encoded, fmt) * 1.0
"""


@pytest.mark.parametrize("has_file", [True, False])
def test_pieces_of_a_codec_that_has_changed_are_not_taken(model, tmp_path, own_file, has_file):
    found = []
    for factor in ("1.0", "1.5"):
        source, typed = CODEC.replace("1.0", factor), {"__name__": "typed"}
        exec(source, typed)
        with codecs.registered((own_file(source).Mine if has_file else typed["Mine"])()):
            plan = Plan.uniform(model, 2, 2, key_codec="mine", value_codec="mine")
            own = plan_contestant(plan, model, name="own", method="uniform", prefill="quantized")
            reader = Reader(model, Letters(), own, out=tmp_path / "out.jsonl")
            found.append(reader.loglikelihood(CONTEXT, CONTINUATION))
            windows, out = random_windows(1, 256), tmp_path / "fidelity.jsonl"
            found.append(fidelity(model, windows, [own], out=out)[-1]["kld"]["value"])
    assert found[0] != found[2]
    assert found[1] != found[3]


def test_pieces_of_a_codec_of_ones_own_that_is_the_same_are_taken(model, tmp_path, own_file):
    contestants = []
    for source in (CODEC, CODEC + "\n# a remark\n"):
        with codecs.registered(own_file(source).Mine()):
            plan = Plan.uniform(model, 2, 2, key_codec="mine", value_codec="mine")
            contestants.append(plan_contestant(plan, model, name="own", method="uniform").conditions)
    assert contestants[0] == contestants[1]

"""Needle: prompts are exact, answers are read, runs resume."""

from __future__ import annotations

import json

import pytest
import torch

from kvloom.errors import DataError
from kvloom.evaluate import NeedleCase, dense_contestant, needle, needle_cases, needle_prompt
from tests.evaluate.tiny_llama import VOCABULARY, Letters, tiny_model

HAYSTACK = "Grass grows here. It is green! Is it tall? Nobody has measured it. The sky is blue."


def text_of(prompt):
    """Letters maps ord % 97; what is printable below 97 + 32 comes back unambiguously."""
    return [int(token) for token in prompt[0]]


def find(haystack, needle):
    return [i for i in range(len(haystack)) if haystack[i : i + len(needle)] == needle]


def test_18_cases_of_three_lengths():
    cases = needle_cases()
    assert len(cases) == len(set(cases)) == 18
    assert {case.tokens for case in cases} == {1024, 2048, 4096}
    assert all(case.number.isdigit() and len(case.number) == 7 for case in cases)
    assert len({case.number for case in cases}) == 18


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_prompts_have_the_exact_length_and_the_needle_at_its_depth(depth):
    case = NeedleCase(tokens=1500, depth=depth, seed=0)
    ids = text_of(needle_prompt(Letters(), HAYSTACK, case))
    assert len(ids) == 1500
    sentence = f" One of the special magic numbers for {case.city} is: {case.number}."
    code = Letters()(sentence).input_ids
    (at,) = find(ids, code)
    start = find(ids, Letters()("afterwards.\n").input_ids)[0] + len("afterwards.\n")
    end = find(ids, Letters()("\nWhat is the special").input_ids)[0]
    reached = (at - start) / (end - start - len(code))
    assert abs(reached - depth) < 40 / (end - start)  # the nearest end of a sentence


def test_prompts_are_the_same_every_time_and_differ_by_seed():
    case = NeedleCase(800, 0.5, 0)
    assert torch.equal(needle_prompt(Letters(), HAYSTACK, case), needle_prompt(Letters(), HAYSTACK, case))
    other = NeedleCase(800, 0.5, 1)
    assert (case.city, case.number) != (other.city, other.number)


def test_a_short_prompt_or_an_empty_haystack_is_refused():
    with pytest.raises(DataError, match="no room"):
        needle_prompt(Letters(), HAYSTACK, NeedleCase(100, 0.5, 0))
    with pytest.raises(DataError, match="of 0 characters"):
        needle_prompt(Letters(), "", NeedleCase(1000, 0.5, 0))


class Knowing(Letters):
    """A tokenizer whose decoding names the number of the case that is asked."""

    def __init__(self, number):
        self.number = number

    def decode(self, ids, skip_special_tokens=False):
        return f" {self.number}."


def test_found_means_the_digits_are_in_the_answer():
    model = tiny_model()
    cases = [NeedleCase(640, depth, 0) for depth in (0.1, 0.9)]
    tokenizer = Knowing(cases[1].number)
    (record,) = needle(model, tokenizer, HAYSTACK, [dense_contestant(model)], cases=cases)
    assert (record["found"], record["total"]) == (1, 2)
    assert record["score"]["value"] == 0.5
    assert record["score"]["low"] < 0.5 < record["score"]["high"]
    assert record["true_bits"] == 16
    assert 640 <= record["context"] < 640 + 16
    assert [case["found"] for case in record["cases"]] == [False, True]
    assert record["cases"][0] == {
        "tokens": 640,
        "depth": 0.1,
        "seed": 0,
        "found": False,
        "answer": f" {cases[1].number}.",
    }


def test_an_interrupted_run_goes_on(tmp_path):
    model = tiny_model()
    cases = [NeedleCase(640, depth, 0) for depth in (0.1, 0.5, 0.9)]
    out = tmp_path / "needle.jsonl"

    def stop(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        needle(model, Letters(), HAYSTACK, [dense_contestant(model)], cases=cases, out=out, progress=stop)
    pieces = tmp_path / "needle.jsonl.pieces"
    assert len(pieces.read_text().splitlines()) == 2
    resumed = needle(model, Letters(), HAYSTACK, [dense_contestant(model)], cases=cases, out=out)
    assert len(pieces.read_text().splitlines()) == 3
    whole = needle(model, Letters(), HAYSTACK, [dense_contestant(model)], cases=cases)
    assert resumed[0]["cases"] == whole[0]["cases"]
    assert json.loads(out.read_text()) == resumed[0]
    assert all(0 <= token < VOCABULARY for token in text_of(needle_prompt(Letters(), HAYSTACK, cases[0])))


def test_needles_longer_than_the_model_reads_are_refused():
    model = tiny_model()
    case = NeedleCase(model.config.max_position_embeddings - 15, 0.5, 0)
    with pytest.raises(DataError, match="needle takes 1025 tokens of prompt and answer, and the model reads 1024"):
        needle(model, Letters(), HAYSTACK, [dense_contestant(model)], cases=[case])

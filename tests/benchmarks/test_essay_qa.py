"""Questions on the essays: each has its answer in its document, in LongBench's schema."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import essay_qa
from benchmarks.essay_qa import DEPTHS, QUESTIONS, Question
from benchmarks.tokens_or_bits import DOCUMENT
from kvloom.assets import load_tokenizer
from kvloom.errors import DataError
from kvloom.evaluate import Settings, choose


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_every_document_says_the_answer_where_it_is_asked_for(tokenizer):
    depths = []
    for row, question in zip(essay_qa.rows(tokenizer, DOCUMENT), QUESTIONS, strict=True):
        document = row["context"]
        assert document.count(question.found) == 1
        assert row["input"] == question.asked
        assert any(answer.removeprefix("the ") in document for answer in row["answers"])
        depths.append(document.index(question.found) / len(document))
    assert min(depths) <= min(DEPTHS)
    assert max(depths) == pytest.approx(max(DEPTHS), abs=0.05)


def test_the_task_of_longbench_reads_what_is_written(tmp_path, tokenizer):
    file = essay_qa.write_rows(tmp_path, tokenizer, DOCUMENT)
    assert [json.loads(line)["_id"] for line in file.read_text(encoding="utf-8").splitlines()][:2] == [
        "essays-0",
        "essays-1",
    ]
    assert list(file.parent.iterdir()) == [file]
    (task,) = choose([f"longbench/{essay_qa.SET}"], Settings(data=tmp_path, lengths=(2048,))).tasks
    assert task.name == "longbench/multifieldqa_en"
    (tokens,) = {len(case.prompt) for case in task.cases(SimpleNamespace(tokenizer=tokenizer))}
    assert DOCUMENT < tokens < 2048


@pytest.mark.parametrize("found", ["the", "said nowhere at all"])
def test_a_sentence_that_is_not_said_once_is_refused(monkeypatch, tokenizer, found):
    monkeypatch.setattr(essay_qa, "QUESTIONS", (Question(found, "Which?", ("x",)),))
    with pytest.raises(DataError, match="needs once"):
        essay_qa.rows(tokenizer, DOCUMENT)


def test_essays_that_are_too_short_are_refused(tokenizer):
    with pytest.raises(DataError, match="have no"):
        essay_qa.rows(tokenizer, 10**6)


def test_a_number_of_tokens_that_no_stretch_has_is_refused(monkeypatch, tokenizer):
    monkeypatch.setattr(essay_qa, "_count", lambda *_: 0)
    with pytest.raises(DataError, match="no stretch behind character"):
        essay_qa.rows(tokenizer, 40)

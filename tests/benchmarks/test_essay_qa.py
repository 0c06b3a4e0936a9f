"""Questions on the essays: each has its answer in its document, in LongBench's schema."""

from __future__ import annotations

import json

import pytest

from benchmarks import essay_qa
from benchmarks.essay_qa import DEPTHS, QUESTIONS, Question
from kvloom.errors import DataError
from kvloom.evaluate import Settings, choose

CHARACTERS = 8000


def test_every_document_says_the_answer_where_it_is_asked_for():
    depths = []
    for row, question in zip(essay_qa.rows(CHARACTERS), QUESTIONS, strict=True):
        document = row["context"]
        assert len(document) == CHARACTERS
        assert document.count(question.found) == 1
        assert row["input"] == question.asked
        assert any(answer.removeprefix("the ") in document for answer in row["answers"])
        depths.append(document.index(question.found) / CHARACTERS)
    assert min(depths) <= min(DEPTHS)
    assert max(depths) == pytest.approx(max(DEPTHS), abs=0.01)


def test_the_task_of_longbench_reads_what_is_written(tmp_path):
    file = essay_qa.write_rows(tmp_path, CHARACTERS)
    assert [json.loads(line)["_id"] for line in file.read_text(encoding="utf-8").splitlines()][:2] == [
        "essays-0",
        "essays-1",
    ]
    assert list(file.parent.iterdir()) == [file]
    (task,) = choose([f"longbench/{essay_qa.SET}"], Settings(data=tmp_path, lengths=(2048,))).tasks
    assert task.name == "longbench/multifieldqa_en"


@pytest.mark.parametrize("found", ["the", "said nowhere at all"])
def test_a_sentence_that_is_not_said_once_is_refused(monkeypatch, found):
    monkeypatch.setattr(essay_qa, "QUESTIONS", (Question(found, "Which?", ("x",)),))
    with pytest.raises(DataError, match="needs once"):
        essay_qa.rows(CHARACTERS)

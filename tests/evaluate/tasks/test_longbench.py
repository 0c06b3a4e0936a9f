"""LongBench: prompts, cutting, post-processing and metrics of the 16 English sets."""

from __future__ import annotations

import pytest

from kvloom.errors import DataError
from kvloom.evaluate.tasks import Bench, Settings, choose, task_names
from kvloom.evaluate.tasks._longbench import MARGIN, cut
from kvloom.evaluate.tasks._longbench_sets import SETS
from tests.evaluate.tasks.data import longbench_row, write_rows
from tests.evaluate.tasks.test_gsm8k import Text, text_of
from tests.evaluate.tiny_llama import tiny_model

PUBLISHED = {
    "narrativeqa": (128, "f1"),
    "qasper": (128, "f1"),
    "multifieldqa_en": (64, "f1"),
    "hotpotqa": (32, "f1"),
    "2wikimqa": (32, "f1"),
    "musique": (32, "f1"),
    "gov_report": (512, "rouge_l"),
    "qmsum": (512, "rouge_l"),
    "multi_news": (512, "rouge_l"),
    "trec": (64, "classification"),
    "triviaqa": (32, "f1"),
    "samsum": (128, "rouge_l"),
    "passage_count": (32, "count"),
    "passage_retrieval_en": (32, "retrieval"),
    "lcc": (64, "edit_similarity"),
    "repobench-p": (64, "edit_similarity"),
}
NO_CHAT = {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def task(folder, name, *rows, **settings):
    write_rows(folder / "longbench" / f"{name}.jsonl", list(rows))
    (made,) = choose([f"longbench/{name}"], Settings(data=folder, **settings)).tasks
    return made


def cases(made, model=None):
    return made.cases(Bench(model, Text(), (), None, None, None))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sets_are_as_published(tmp_path, name):
    made = task(tmp_path, name, longbench_row(), lengths=(10_000,))
    tokens, metric = PUBLISHED[name]
    assert made.request.new_tokens == tokens
    assert SETS[name].metric == metric
    text = text_of(cases(made)[0])
    assert text.startswith("\0" if name in NO_CHAT else "<user>")
    assert "A long story by Ann." in text
    asked = name not in {"gov_report", "multi_news", "passage_count", "lcc"}
    assert ("Who wrote it?" in text) == asked
    assert (made.request.ends, made.request.at_least) == ((("\n",), 1) if name == "samsum" else ((), 0))


def test_there_are_sixteen():
    assert {name.removeprefix("longbench/") for name in task_names() if "longbench" in name} == set(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "answer", "references", "classes", "score"),
    [
        ("narrativeqa", " Ann Lee.", ["Ann", "Ann Lee"], None, 1),
        ("hotpotqa", "It was Ann", ["Ann"], None, 1 / 2),
        ("triviaqa", "\nAnn\nPassage: more", ["Ann"], None, 1),
        ("hotpotqa", "Ann\nPassage: more", ["Ann"], None, 1 / 2),
        ("trec", "Type: City\nQuestion", ["City"], ["City", "State"], 1),
        ("trec", "City or State", ["City"], ["City", "State"], 1 / 2),
        ("passage_count", "7 or 8", ["7"], None, 1 / 2),
        ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], None, 1),
        ("passage_retrieval_en", "Paragraph 1", ["Paragraph 12"], None, 0),
        ("lcc", "\n# no\nreturn x\n", ["return x"], None, 1),
        ("repobench-p", "return y", ["return x"], None, 0.88),
    ],
)
def test_scores(tmp_path, name, answer, references, classes, score):
    made = task(tmp_path, name, longbench_row(answers=references, all_classes=classes), lengths=(10_000,))
    (case,) = cases(made)
    assert made.scores(case, answer) == {PUBLISHED[name][1]: pytest.approx(score)}


def test_summaries_take_rouge_and_only_samsums_first_line_counts(tmp_path):
    pytest.importorskip("rouge_score")
    row = longbench_row(answers=["one two three four"])
    for name, score in (("gov_report", 8 / 9), ("samsum", 1.0)):
        made = task(tmp_path, name, row, lengths=(10_000,))
        (found,) = made.scores(cases(made)[0], "one two three four\nmore").values()
        assert found == pytest.approx(score, abs=1e-9)


def test_a_long_prompt_loses_its_middle(tmp_path):
    made = task(tmp_path, "trec", longbench_row(context="x" * 5000), lengths=(1001,))
    text = text_of(cases(made)[0])
    assert len(text) == 1 + 2 * 500 - 1  # the cut drops what begins the text, and it comes again
    whole = SETS["trec"].prompt.format(context="x" * 5000, input="Who wrote it?")
    assert text == "\0" + whole[:499] + whole[-500:]
    assert cut(Text(), "short", 6) == "short"
    assert cut(Text(), "shorts", 6) == "shrts"  # six letters and a token that begins the text


def test_by_default_prompts_leave_room_in_the_model(tmp_path):
    model = tiny_model()
    made = task(tmp_path, "lcc", longbench_row(context="x" * 5000))
    assert len(cases(made, model)[0].prompt) == 2 * ((1024 - MARGIN) // 2)
    assert made.facts()["length"] == 1024 - MARGIN
    model.config.max_position_embeddings = 500
    made = task(tmp_path, "lcc", longbench_row(context="x" * 5000))
    with pytest.raises(DataError, match="The model reads 500 tokens"):
        cases(made, model)


def test_missing_and_foreign_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"There is no '.*longbench.trec\.jsonl'"):
        choose(["longbench/trec"], Settings(data=tmp_path))
    row = longbench_row()
    del row["all_classes"]
    with pytest.raises(DataError, match=r"Row 2 of trec\.jsonl has no 'all_classes'"):
        task(tmp_path, "trec", longbench_row(), row)
    write_rows(tmp_path / "longbench" / "lcc.jsonl", [])
    with pytest.raises(DataError, match="holds no rows"):
        choose(["longbench/lcc"], Settings(data=tmp_path))


def test_the_group_is_what_is_there(tmp_path):
    write_rows(tmp_path / "longbench" / "lcc.jsonl", [longbench_row()])
    chosen = choose(["longbench"], Settings(data=tmp_path))
    assert [each.name for each in chosen.tasks] == ["longbench/lcc"]
    assert len(chosen.notes) == 15
    with pytest.raises(DataError, match="There is no"):
        choose(["longbench"], Settings(data=tmp_path / "absent"))


def test_records_of_summaries_say_whose_rouge_it_is(tmp_path):
    assert "rouge-score" in task(tmp_path, "qmsum", longbench_row()).facts()["metric_note"]
    assert "metric_note" not in task(tmp_path, "lcc", longbench_row()).facts()

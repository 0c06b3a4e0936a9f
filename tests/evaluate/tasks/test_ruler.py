"""RULER: every sub-task is what its definition says, of the exact length, the same every time."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from random import Random
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import DataError, MissingExtraError
from kvloom.evaluate.tasks import Settings, choose
from kvloom.evaluate.tasks.ruler._cwe import CommonWords
from kvloom.evaluate.tasks.ruler._fwe import FrequentWords
from kvloom.evaluate.tasks.ruler._niah import NIAH, NOISE, essay_words
from kvloom.evaluate.tasks.ruler._qa import Questions, hotpotqa, squad
from kvloom.evaluate.tasks.ruler._task import LENGTH, Ruler
from kvloom.evaluate.tasks.ruler._vt import VariableTracking
from tests.evaluate.tasks.data import HOTPOTQA, SQUAD, write_ruler
from tests.evaluate.tiny_llama import Letters

ESSAYS = essay_words([f"Sentence {n} has seven words in it. And another one!" for n in range(90)])


class Words(Letters):
    """A tokenizer of one token a word, and one for what begins a text."""

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [1] * add_special_tokens + [2 + crc32(word.encode()) % 90 for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})


WORDY = {"cwe", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multivalue", "niah_multiquery"}
WORDY |= {"niah_multikey_1", "niah_multikey_2"}


def sub_tasks():
    niah = [each.among(ESSAYS) if each.haystack == "essay" else each for each in NIAH]
    own = [VariableTracking(), CommonWords(), FrequentWords()]
    return [*niah, *own, Questions("qa_1", squad(SQUAD)), Questions("qa_2", hotpotqa(HOTPOTQA))]


def wordless(name):
    return name in WORDY and find_spec("wonderwords") is None


EVERY = [
    pytest.param(
        each, id=each.name, marks=pytest.mark.skipif(wordless(each.name), reason="wonderwords is not installed")
    )
    for each in sub_tasks()
]


def by_name(name):
    if wordless(name):
        pytest.skip("wonderwords is not installed")
    return next(each for each in sub_tasks() if each.name == name)


def drawn(name, units, seed=0, room=LENGTH):
    draft = by_name(name).draft(Random(seed), seed, room, Words())
    return draft, draft.question(units)


def test_there_are_thirteen():
    assert len({each.name for each in sub_tasks()}) == 13


@pytest.mark.parametrize("sub", EVERY)
@pytest.mark.parametrize("length", [900, 4096])
def test_prompts_are_as_long_as_they_may_be_and_the_same_every_time(sub, length):
    cases = list(Ruler(sub, length, 3, seed=0).questions(Words()))
    again = list(Ruler(sub, length, 3, seed=0).questions(Words()))
    assert cases == again
    assert len({tuple(case.references) for case in cases}) == 3
    unit = 70 if sub.name.startswith("qa") else 16  # a document, or a sentence
    for case in cases:
        assert length - unit < len(case.prompt) + sub.new_tokens <= length
    assert list(Ruler(sub, length, 3, seed=1).questions(Words())) != cases
    assert list(Ruler(sub, length, 1, seed=0).questions(Words())) == cases[:1]  # a longer run has the shorter one's


@pytest.mark.parametrize("sub", EVERY)
def test_a_length_without_room_is_one_sentence(sub):
    with pytest.raises(DataError, match=rf"^ruler/{sub.name} has at least \d+ tokens of prompt, and there is room"):
        list(Ruler(sub, sub.new_tokens + 9, 1, seed=0).questions(Words()))


@pytest.mark.parametrize("sub", EVERY)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), units=st.integers(0, 60))
def test_more_units_are_more_text_with_the_same_answers(sub, seed, units):
    draft = sub.draft(Random(seed), seed, LENGTH, Words())
    shorter, longer = (draft.question(draft.least + more) for more in (units, units + 7))
    assert len(shorter) < len(longer)
    assert draft.question(draft.least + units) == shorter
    text = longer + draft.opening
    assert sub.score(" ".join(draft.references), draft.references) == 1
    assert sub.score("", draft.references) == 0
    assert all(reference in text for reference in draft.references)


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked", "key", "value"),
    [
        ("niah_single_1", 1, 1, 1, r"[\w' -]+-[\w' -]+", r"\d{7}"),
        ("niah_single_2", 1, 1, 1, r"[\w' -]+-[\w' -]+", r"\d{7}"),
        ("niah_single_3", 1, 1, 1, r"[\w' -]+-[\w' -]+", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, 1, r"[\w' -]+-[\w' -]+", r"\d{7}"),
        ("niah_multivalue", 1, 4, 1, r"[\w' -]+-[\w' -]+", r"\d{7}"),
        ("niah_multiquery", 4, 1, 4, r"[\w' -]+-[\w' -]+", r"\d{7}"),
    ],
)
def test_needles(name, keys, values, asked, key, value):
    draft, text = drawn(name, 400)
    hidden = re.findall(r"One of the special magic (?:numbers|uuids) for (.+?) is: (.+?)\.(?:\s|$)", text)
    assert len(hidden) == keys * values
    assert len({each for each, _ in hidden}) == keys
    assert all(re.fullmatch(key, each) and re.fullmatch(value, said) for each, said in hidden)
    assert len(draft.references) == asked * values
    assert set(draft.references) <= {said for _, said in hidden}
    questioned = text.rpartition("\nWhat ")[2]
    told = {each for each, said in hidden if said in draft.references}
    assert all(each in questioned for each in told)
    many = asked * values > 1
    assert text.startswith("Some special magic numbers are hidden" if many else "A special magic ")
    assert draft.opening.endswith(" are" if many else " is")
    if asked == 4:
        assert questioned.count(",") == 3
        assert ", and " in questioned


@pytest.mark.parametrize(("name", "kind"), [("niah_multikey_2", "numbers"), ("niah_multikey_3", "uuids")])
def test_other_needles_are_the_haystack(name, kind):
    draft, text = drawn(name, 30)
    lines = text.split("\n")[1:-1]
    assert len(lines) == 31
    assert all(line.startswith(f"One of the special magic {kind} for ") for line in lines)
    assert sum(draft.references[0] in line for line in lines) == 1


def test_noise_is_repeated_round_by_round():
    draft, text = drawn("niah_single_1", 12)
    lines = [line for line in text.split("\n")[1:-1] if draft.references[0] not in line]
    assert lines == [" ".join(NOISE)] * 2 + [" ".join(NOISE[:2])]


def test_needles_lie_at_every_depth():
    depths = []
    for seed in range(60):
        draft, text = drawn("niah_single_2", 600, seed)
        depths.append(text.index(f"is: {draft.references[0]}") / len(text))
    assert min(depths) < 0.15
    assert max(depths) > 0.85


def test_essays_start_again_where_they_end():
    _, text = drawn("niah_single_2", 3 * len(ESSAYS))
    assert text.count("Sentence 7 has") == 3
    with pytest.raises(DataError, match="no words"):
        essay_words([" "])


def test_a_chain_of_variables_is_told_in_order_after_an_example():
    draft, text = drawn("vt", 40)
    example, task = re.split(r"\n\n(?=Memorize)", text)
    assert len(example.split()) < 520
    assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)
    value = re.search(r"assigned the value (\d{5}) in the text above\.$", task)[1]
    told = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", task, re.MULTILINE)
    assert [name for name, _ in told] == draft.references
    assert [before for _, before in told] == [value, *draft.references[:-1]]
    assert all(re.fullmatch("[A-Z]{5}", name) for name in draft.references)
    assert draft.opening.endswith(f"5 variables are assigned the value {value}, they are: ")


@pytest.mark.parametrize(("room", "example", "often", "seldom"), [(4096, (10, 3), 30, 3), (2048, (3, 1), 6, 1)])
def test_common_words_come_often(room, example, often, seldom):
    draft, text = drawn("cwe", 50, room=room)
    shown, task = text.split("\nBelow is")
    for part, counts, size in ((shown, example, 40 if room == 4096 else 20), (task, (often, seldom), 50)):
        listed = part.partition("appear most often.\n")[2].partition("\nQuestion")[0]
        words = re.split(r" ?\d+\. ", listed)[1:]
        assert Counter(Counter(words).values()) == {counts[0]: 10, counts[1]: size - 10}
        common = {word for word, count in Counter(words).items() if count == counts[0]}
        if part is task:
            assert common == set(draft.references)
        else:
            assert set(re.split(r" ?\d+\. ", part.rpartition("are:")[2])[1:]) == common


def test_common_words_go_on_with_pairs_where_the_list_ends():
    drawn("cwe", 20)
    from kvloom.evaluate.tasks.ruler._words import single_words

    more = len(single_words()) + 5
    draft, text = drawn("cwe", more)
    assert draft.question(more - 3) != text
    assert draft.question(more) == text
    assert drawn("cwe", more)[1] == text
    last = Counter(re.split(r" ?\d+\. ", text.split("\nBelow is")[1].partition("\nQuestion")[0])[1:])
    assert len(last) == more


def test_made_up_words_come_as_often_as_a_zeta_distribution_has_them():
    draft, text = drawn("fwe", 1000)
    words = text.partition("coded words. ")[2].partition("\nQuestion")[0].split()
    counts = Counter(words).most_common()
    assert [word for word, _ in counts[:4]] == ["...", *draft.references]
    assert [count for _, count in counts[:4]] == [607, 151, 67, 37]  # 1000 / (rank^2 * 1.644934)
    assert all(re.fullmatch("[a-z]{6}", word) for word in draft.references)


def test_documents_that_answer_are_among_others():
    draft, text = drawn("qa_1", 7)
    documents = re.findall(r"^Document (\d+):$", text, re.MULTILINE)
    assert documents == [str(place) for place in range(1, 8)]
    assert text.count("Article 0, paragraph 0.") == 1
    assert "Article 0, paragraph 1." in text  # of the same article: those come first
    assert draft.references == ["colour-0-0"]
    assert text.endswith("\n\nQuestion: What is the colour of 0, 0?")
    assert drawn("qa_1", 40)[1].count("Article 0, paragraph 0.") == 3  # all 18 are there, and again


def test_impossible_questions_are_left_out_and_all_documents_of_a_question_are_needed():
    assert len(squad(SQUAD)) == 18
    first = hotpotqa(HOTPOTQA)[0]
    assert first.needed[0] == "Title 0 0\nOne sentence. It is in place 0."
    draft, text = drawn("qa_2", 3)
    assert draft.least == 3
    assert text.count("Title 0 ") == 3


@pytest.mark.parametrize("document", [{}, {"data": []}, [], [{"question": "x"}], 3, {"data": [{"paragraphs": 3}]}])
def test_files_of_another_schema_are_refused(document):
    for read in (squad, hotpotqa):
        with pytest.raises(DataError, match=r"(squad|hotpotqa)\.json .*give the file as it comes"):
            read(document)


def test_the_group_leaves_out_what_has_no_data_and_says_so(tmp_path, fetched):
    by_name("cwe")
    chosen = choose(["ruler"], Settings(limit=1))
    assert len(chosen.tasks) == 11
    assert [note.partition(" is left out: ")[0] for note in chosen.notes] == ["ruler/qa_1", "ruler/qa_2"]
    assert "squad.json" in chosen.notes[0]
    with pytest.raises(DataError, match=r"There is no '.*squad.json': put the published file there"):
        choose(["ruler/qa_1"], Settings())
    every = choose(["ruler"], Settings(limit=1, lengths=(1024, 2048), data=write_ruler(tmp_path)))
    assert len(every.tasks) == 26
    assert not every.notes


def test_sub_tasks_of_words_say_before_they_run_what_they_need(monkeypatch, fetched):
    from kvloom import _extras

    monkeypatch.setattr(_extras, "_found", lambda module: module != "wonderwords")
    with pytest.raises(MissingExtraError, match=r"^A list of English words needs wonderwords: run pip install"):
        choose(["ruler/cwe"], Settings())
    chosen = choose(["ruler"], Settings(limit=1))
    assert {task.name for task in chosen.tasks} == {"ruler/fwe", "ruler/vt", "ruler/niah_multikey_3"}

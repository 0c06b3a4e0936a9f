"""Metrics against slow implementations of their published definitions, and cases worked out by hand."""

from __future__ import annotations

import string
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.evaluate import metrics

EXACT = {"rel": 0, "abs": 1e-9}
TEXT = st.lists(
    st.sampled_from("the a an The Cat cat, dog. DOG ran! 12 7 -3 $1,200 4. #### `x` // # \n".split(" ")), max_size=10
).map(" ".join)


def slow_words(text):
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def slow_f1(answer, reference):
    ours, theirs, common = slow_words(answer), slow_words(reference), 0
    left = list(theirs)
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    return 2 * (common / len(ours)) * (common / len(theirs)) / (common / len(ours) + common / len(theirs))


@given(TEXT, TEXT)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(answer, reference):
    assert metrics.token_f1(answer, reference) == pytest.approx(slow_f1(answer, reference), **EXACT)


def test_f1_by_hand():
    assert metrics.token_f1("The cat sat on the mat.", "a cat on a hat") == pytest.approx(
        2 * (2 / 4) * (2 / 3) / (7 / 6)
    )
    assert metrics.token_f1("yes", "Yes!") == 1
    assert metrics.token_f1("", "yes") == 0


def slow_lcs(ours, theirs):
    """Length of the longest common subsequence, by trying all of the shorter one's."""
    for size in range(len(ours), 0, -1):
        for picked in combinations(ours, size):
            rest = iter(theirs)
            if all(word in rest for word in picked):
                return size
    return 0


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abcd"), max_size=9))
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(ours, theirs):
    pytest.importorskip("rouge_score")
    common = slow_lcs(ours, theirs)
    expected = 2 * common / (len(ours) + len(theirs)) if common else 0.0
    assert metrics.rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(expected, **EXACT)


def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    answer, reference = "The reports say: nothing, changed.", "A report says that nothing has changed!"
    assert metrics.rouge_l(answer, reference) == scorer.score(reference, answer)["rougeL"].fmeasure > 0


def test_rouge_l_without_its_package_is_one_sentence(monkeypatch):
    from kvloom import _extras
    from kvloom.errors import MissingExtraError
    from kvloom.evaluate.metrics._rouge import _scorer

    _scorer.cache_clear()
    monkeypatch.setattr(_extras, "_found", lambda module: module != "rouge_score")
    with pytest.raises(MissingExtraError, match=r"^ROUGE-L needs rouge_score: run pip install 'kvloom\[tasks\]'\.$"):
        metrics.rouge_l("a", "a")


@pytest.mark.parametrize(
    ("answer", "reference", "classes", "score"),
    [
        ("Location", "Location", ["Location", "City"], 1),
        ("Location or City", "Location", ["Location", "City"], 1 / 2),
        ("City", "Location", ["Location", "City"], 0),
        ("none", "Location", ["Location", "City"], 0),
        ("Other location", "Other location", ["Other location", "location", "City"], 1),
        (
            "Other location",
            "Other location",
            ["Other", "location", "Other location"],
            1 / 2,
        ),  # location is not looked at
        ("Other location", "Other location", ["Other", "City", "location", "Other location"], 1 / 2),
    ],
)
def test_classification(answer, reference, classes, score):
    assert metrics.classification(answer, reference, classes) == pytest.approx(score, **EXACT)


@given(TEXT, st.permutations(["cat", "Cat", "ca", "dog", "1", "12", "DOG"]), st.integers(0, 6))
def test_classification_walks_its_list_as_the_published_scorer(answer, classes, right):
    reference = classes[right]
    found = [name for name in classes if name in answer]
    for name in found:  # changed while it is walked through: that is the published definition
        if name in reference and name != reference:
            found.remove(name)
    expected = 1.0 / len(found) if reference in found else 0.0
    assert metrics.classification(answer, reference, classes) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("\n\nreturn x\nmore", "return x", 1),
        ("# a comment\n// another\n`code`\nreturn y", "return x", 0.88),  # 2 * 7 / 16 = 0.875
        ("# only a comment", "return x", 0),
        ("", "", 1),
        ("abcd", "bcde", 0.75),
    ],
)
def test_edit_similarity(answer, reference, score):
    assert metrics.edit_similarity(answer, reference) == pytest.approx(score, **EXACT)


@pytest.mark.parametrize(
    ("answer", "number", "share"),
    [("7", "7", 1), ("7 or 17", "7", 1 / 2), ("7, 7 and 8", "7", 2 / 3), ("none", "7", 0), ("07", "7", 0)],
)
def test_share_of_a_number(answer, number, share):
    assert metrics.share_of_number(answer, number) == pytest.approx(share, **EXACT)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("so 4 + 5 = 9.", "9."),
        ("it costs $1,200", "$1,200"),
        ("minus -3 degrees", "-3"),
        ("no number", ""),
        ("wait...", "..."),
        ("7 apples", "7"),
    ],
)
def test_last_number(text, last):
    assert metrics.last_number(text) == last


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("The answer is 42.", "42"),
        ("The answer is 1,200. The answer is 3.", "1,200."),
        ("The answer is 42", "4"),  # as published: one more character is wanted
        ("42", ""),
    ],
)
def test_stated_number(text, stated):
    assert metrics.stated_number(text, r"The answer is (-?[0-9.,]+).") == stated


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [("1,200", "1200", 1), ("$5", "5", 1), ("9.", "9", 1), ("9.0", "9", 0), ("", "9", 0), ("x #### 3", "3", 1)],
)
def test_exact_match(ours, theirs, same):
    assert metrics.exact_match(ours, theirs) == same


def test_string_matches_of_ruler():
    answer = " They are: 1234567, and AbC-x\x00done "
    assert metrics.match_all(answer, ["1234567", "abc-X", "7654321"]) == pytest.approx(2 / 3, **EXACT)
    assert metrics.match_part(answer, ["nothing", "DONE"]) == 1
    assert metrics.match_part(answer, ["nothing"]) == 0
    assert metrics.match_all(answer, ["x\ndone"]) == 1

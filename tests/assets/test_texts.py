from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from kvloom.assets import CALIBRATION, ESSAYS, EVALUATION, Text, digest, essays_dir, texts
from kvloom.errors import DataError


def test_the_split_is_every_third_essay_and_the_rest():
    assert list(ESSAYS) == sorted(set(ESSAYS))
    assert CALIBRATION[:3] == (ESSAYS[2], ESSAYS[5], ESSAYS[8])
    assert not set(CALIBRATION) & set(EVALUATION)
    assert sorted(CALIBRATION + EVALUATION) == list(ESSAYS)


def test_the_names_are_those_of_the_fetched_essays(fetched: None):
    assert sorted(file.stem for file in essays_dir().iterdir()) == list(ESSAYS)
    assert [text.name for text in texts()] == list(ESSAYS)


def test_there_is_enough_to_score(fetched: None):
    assert sum(len(text.content.encode()) for text in texts(EVALUATION)) >= 300_000
    assert sum(len(text.content.encode()) for text in texts(CALIBRATION)) >= 150_000


def test_no_long_passage_is_in_both_halves(fetched: None):
    """Two essays, one in each half, quote the same 41 words by someone else; that is all."""

    def passages(names: tuple[str, ...]) -> set[str]:
        words = [text.content.split() for text in texts(names)]
        return {" ".join(w[i : i + 42]) for w in words for i in range(len(w) - 41)}

    shared = passages(CALIBRATION) & passages(EVALUATION)
    assert not shared


def test_local_files(tmp_path: Path):
    plain = tmp_path / "novel.txt"
    plain.write_text("It was a dark night: naïve.\n", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert texts([plain, str(rows)]) == [
        Text("novel.txt", "It was a dark night: naïve.\n"),
        Text("rows.jsonl:1", "one"),
        Text("rows.jsonl:3", "two"),
    ]


def test_digests_tell_content_and_order_apart():
    a, b = Text("a", "é"), Text("b", "y")
    assert a.sha256 == sha256("é".encode()).hexdigest()
    assert digest([a, b]) == digest([Text("other name", "é"), b])
    assert digest([a, b]) != digest([b, a])
    assert digest([Text("a", "xy")]) != digest([Text("a", "x"), Text("b", "y")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 of .* is not JSON"),
        ('["text"]', 'Line 2 of .* has no string field "text"'),
        (json.dumps({"text": 3}), 'Line 2 of .* has no string field "text"'),
    ],
)
def test_bad_rows_name_the_line(tmp_path: Path, line: str, message: str):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        texts([rows])


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"'.*absent.txt' cannot be read \(No such file"):
        texts([tmp_path / "absent.txt"])
    with pytest.raises(DataError, match=r"essay 'essay-on-nothing' is unknown.* or name a \.txt or \.jsonl file"):
        texts(["essay-on-nothing"])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 2\)"):
        texts([latin])


def test_unfetched_essays_say_which_command_fetches_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="run `kvloom fetch`"):
        texts(["addiction"])

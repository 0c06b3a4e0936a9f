from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from kvloom.errors import DataError
from kvloom.report import load_records

DENSE = {"kind": "fidelity", "name": "dense", "method": "dense"}
SIGNAL = {"kind": "signal", "layers": [0]}


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_file_gives_its_records_in_order(tmp_path: Path) -> None:
    file = write(tmp_path / "run.jsonl", SIGNAL, DENSE, {"kind": "of a later version"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [record["kind"] for record in load_records(file)] == ["signal", "fidelity", "of a later version"]
        assert load_records(str(file)) == load_records(file)


def test_a_folder_gives_every_results_file_below_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "two.jsonl", SIGNAL)
    write(tmp_path / "a.jsonl", DENSE)
    (tmp_path / "a.jsonl.pieces").write_text("unfinished work\n")
    (tmp_path / "notes.txt").write_text("no records\n")
    assert load_records(tmp_path) == [DENSE, SIGNAL]


@pytest.mark.parametrize("keep", [3, 20, -2])
def test_a_last_record_cut_short_is_skipped_with_a_warning(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / "run.jsonl", DENSE)
    whole = json.dumps({**DENSE, "name": "exact é"}, ensure_ascii=False).encode()
    file.write_bytes(file.read_bytes() + whole[:keep])
    with pytest.warns(UserWarning, match=r"run\.jsonl, line 2: the last record is cut short"):
        assert load_records(file) == [DENSE]


def test_a_folder_may_have_files_of_unknown_kinds_beside_known_ones(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps(DENSE))
    (tmp_path / "serve.jsonl").write_text('{"kind": "serve", "name": "fp16"}\n')
    assert [record["kind"] for record in load_records(tmp_path)] == ["fidelity", "serve"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "fid\n' + json.dumps(DENSE), "line 1 is not JSON"),
        (json.dumps(DENSE) + "\nTraceback (most recent call last):\n", "line 2 is not JSON"),
        ('{\n  "architectures": []\n}\n', "line 1 is not JSON"),
        ('{"text": "a corpus"}\n', "line 1 has no `kind`"),
        ("[1, 2]\n", "line 1 has no `kind`"),
        ('{"kind": 3}\n', "line 1 has no `kind`"),
        ('{"kind": "Pod"}\n', "holds no record whose `kind`"),
        ('{"kind": "fidelity"}\n', "the fidelity record has no `name`"),
        ("", "holds no result records"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_records(file)


def test_a_path_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no result records"):
        load_records(tmp_path)

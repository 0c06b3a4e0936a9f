"""Rows of evaluation data: local files, the hub, the wheel, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from kvloom.assets import _gsm8k, _hub, gsm8k_rows, json_file, longbench_rows
from kvloom.assets._packages import Package, files_digest
from kvloom.assets._rows import Rows, jsonl_rows
from kvloom.errors import DataError, MissingExtraError

GSM8K = {"question": "What?", "answer": "That.\n#### 3"}
LONGBENCH = {"input": "i", "context": "c", "answers": ["a"], "all_classes": None, "_id": "1"}


def write(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return file


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """A hub of these files."""
    files: dict[str, Path] = {}

    def download(repository: str, name: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        if f"{repository}/{name}" not in files:
            raise OSError("Offline mode is enabled.\nMore about it.")
        return str(files[f"{repository}/{name}"])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return files


def test_local_rows_keep_their_order_and_know_their_file(tmp_path: Path):
    rows = jsonl_rows(write(tmp_path / "x.jsonl", {"a": 1}, {"a": "é"}))
    assert rows.rows == ({"a": 1}, {"a": "é"})
    assert rows.facts == {"source": "x.jsonl", "sha256": rows.sha256}
    assert rows.sha256 == Rows(({"a": 1}, {"a": "é"}), "elsewhere").sha256
    assert rows.sha256 != Rows(({"a": "é"}, {"a": 1}), "x.jsonl").sha256
    assert rows.need("a") is rows


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"{", "Line 1 of x.jsonl is not a JSON object"), (b'{"a": 1}\n3', "Line 2"), (b"\xff", "cannot be read")],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, match: str):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=match):
        jsonl_rows(tmp_path / "x.jsonl")


def test_missing_fields_are_named():
    with pytest.raises(DataError, match=r"^Row 2 of x has no 'b': give"):
        Rows(({"a": 1, "b": 2}, {"a": 1}), "x").need("a", "b")
    with pytest.raises(DataError, match="x holds no rows"):
        Rows((), "x").need("a")


def test_json_files(tmp_path: Path):
    (tmp_path / "good.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("[1")
    assert json_file(tmp_path, "good.json") == [1]
    with pytest.raises(DataError, match=r"bad\.json' is not JSON"):
        json_file(tmp_path, "bad.json")
    with pytest.raises(
        DataError, match=r"^There is no 'DATA/ruler/squad\.json': put .* name the folder with --data\.$"
    ):
        json_file(None, "ruler/squad.json")


def test_local_gsm8k_comes_before_all_else(tmp_path: Path, far: dict[str, Path]):
    write(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    assert gsm8k_rows("train", tmp_path).rows == (GSM8K,)
    with pytest.raises(DataError, match=r"There is no .*test\.jsonl"):
        gsm8k_rows("test", tmp_path)


def test_gsm8k_of_the_hub(tmp_path: Path, far: dict[str, Path]):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist([GSM8K, GSM8K]), tmp_path / "x.parquet")
    far["openai/gsm8k/main/test-00000-of-00001.parquet"] = tmp_path / "x.parquet"
    rows = gsm8k_rows("test", None)
    assert rows.rows == (GSM8K, GSM8K)
    assert rows.source == "openai/gsm8k/main/test-00000-of-00001.parquet"


def test_gsm8k_of_the_hub_needs_its_reader(tmp_path: Path, far: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    from kvloom import _extras

    far["openai/gsm8k/main/test-00000-of-00001.parquet"] = tmp_path
    monkeypatch.setattr(_extras, "_found", lambda module: module != "pyarrow")
    with pytest.raises(MissingExtraError, match=r"needs pyarrow: run pip install 'kvloom\[tasks\]'"):
        gsm8k_rows("test", None)


def test_without_the_hub_the_test_rows_come_from_a_wheel(
    tmp_path: Path, far: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    packaged = {"id": "1", "prompt": "What?", "expected": "3", "upstream_answer": GSM8K["answer"]}
    file = write(tmp_path / "cases.jsonl", packaged)
    package = Package("some-rows", "1.0", "rows", ".jsonl", files_digest([file]))
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_gsm8k, "PACKAGE", package)
    fetched = []

    def download(package: Package, folder: Path) -> None:
        fetched.append(package)
        (folder / "cases.jsonl").write_bytes(file.read_bytes())

    monkeypatch.setattr(_gsm8k, "download_files", download)
    for _ in range(2):
        rows = gsm8k_rows("test", None)
        assert rows.rows == (GSM8K,)
        assert rows.source == "some-rows==1.0"
    assert fetched == [package]
    with pytest.raises(DataError, match=r"cannot be taken from the hub \(Offline mode is enabled\): name a folder"):
        gsm8k_rows("train", None)


def test_longbench_of_the_hub_is_one_archive(tmp_path: Path, far: dict[str, Path]):
    with pytest.raises(DataError, match=r"^data\.zip of THUDM/LongBench cannot be taken"):
        longbench_rows("trec", None)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", json.dumps(LONGBENCH))
    far["THUDM/LongBench/data.zip"] = tmp_path / "data.zip"
    rows = longbench_rows("trec", None)
    assert (rows.rows, rows.source) == ((LONGBENCH,), "THUDM/LongBench/data/trec.jsonl")
    with pytest.raises(DataError, match=r"has no data/lcc\.jsonl"):
        longbench_rows("lcc", None)
    (tmp_path / "data.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"has no data/trec\.jsonl"):
        longbench_rows("trec", None)


def test_the_hub_is_asked_by_its_own_client():
    with pytest.raises(DataError, match="cannot be taken from the hub"):
        _hub.hub_file("openai/gsm8k", "no-such-file")

"""Where results go: one option for it, and what cannot be written is refused before the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from kvloom.cli._app import app

KERNELS = ["bench", "kernels", "--device", "cpu", "--shapes", "B1x64", "--pairs", "4:4"]
GENERATE = ["bench", "generate", "--shape", "llama-2-7b", "--device", "cpu"]
SERVE = ["bench", "serve", "absent/model", "--server", "a=http://127.0.0.1:9"]
WRITERS = [KERNELS, GENERATE, SERVE, ["signals", "compare", "absent/model"]]


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.chdir(tmp_path)
    for name in ("kvloom.bench.bench_kernels", "kvloom.assets.random_model", "kvloom.assets.load_tokenizer"):
        monkeypatch.setattr(name, worked)
    monkeypatch.setattr("kvloom.load_model", worked)
    monkeypatch.setattr("kvloom.cli._signals.check_reading", worked)


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize("name", ["-o", "--output"])
def test_a_folder_or_a_file_in_the_way_is_refused_before_the_work(kvloom, tmp_path: Path, words: list[str], name: str):
    (tmp_path / "file").write_text("")
    for output, said in ((tmp_path, "is a folder: name a file"), ("file/x.jsonl", "the folder file cannot be made")):
        failed = kvloom(*words, name, output)
        assert failed.exit_code == 2, failed.output
        assert failed.stderr.startswith("error: the ")
        assert said in failed.stderr


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: " ".join(words[:2]))
def test_the_folder_is_made_before_the_work(kvloom, words: list[str]):
    failed = kvloom(*words, "-o", "new/folder/x.jsonl")
    assert str(failed.exception) == "the work began"
    assert Path("new/folder").is_dir()


def test_outputs_have_one_name():
    commands = typer.main.get_command(app).commands.values()
    singles = [it for command in commands for it in getattr(command, "commands", {"": command}).values()]
    outputs = [tuple(own.opts) for it in singles for own in it.params if own.name in ("out", "output")]
    assert outputs == [("--output", "-o")] * 14

"""`kvloom sweep`: options, and what it prints."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from kvloom.cli import _terminal
from kvloom.report import load_records
from tests.sweep.conftest import home as home
from tests.sweep.runners import Here


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list:
    """Jobs are done in this process; the options that the runner was made with."""
    import kvloom.sweep

    given = []
    monkeypatch.setattr(kvloom.sweep, "Processes", lambda count: given.append(count) or Here())
    return given


def write(folder: Path, text: str) -> Path:
    file = folder / "small.yaml"
    file.write_text(text)
    return file


def test_a_sweep_prints_the_results_of_each_model(kvloom, here, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = f"plans: ['{home}/k2-{{model}}.json']"
    file = write(
        tmp_path, f"models: [{home}/tiny, {home}/deep]\n{plans}\ntasks: [{{task: fidelity, windows: 1, window: 300}}]"
    )
    done = kvloom("sweep", file, "--processes", 3)
    assert done.exit_code == 0, done.output
    assert here == [3]
    assert done.stdout.index("tiny, cpu") < done.stdout.index("k2-tiny (uniform)") < done.stdout.index("deep, cpu")
    assert done.stdout.endswith("wrote runs/small\n")
    assert len(load_records(tmp_path / "runs" / "small")) == 4
    assert kvloom("report", tmp_path / "runs" / "small", "-o", tmp_path / "page.html").exit_code == 0


def test_failed_jobs_are_named_and_the_exit_code_is_1(kvloom, here, home, tmp_path):
    file = write(tmp_path, f"models: [{home}/tiny]\ntasks: [{{task: ruler/vt, lengths: [9000], limit: 1}}]")
    done = kvloom("sweep", file, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "failed: tiny, ruler/vt, dense: ruler/vt takes " in done.stderr


def test_bars_come_and_go_with_their_workers(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(_terminal, "err", shown)
    with _terminal.many_bars() as watch:
        watch("GPU 0", "needle", 1, 3)
        watch("GPU 1", "gone soon", 0, 0)
        watch("GPU 1", "", 0, 0)
        watch("GPU 2", "", 0, 0)
    last = shown.file.getvalue().rpartition("needle")
    assert "GPU 0: " in last[0]
    assert "1/3" in last[2]
    assert "GPU 1" not in last[2]


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("models: [a]\ntask: [fidelity]", (), "field tasks: Field required"),
        ("models: [./a]\ntasks: [fidelity]", (), "There is no model folder"),
        ("", ("--processes", 2, "--ray", "local"), "--processes is of this machine"),
    ],
)
def test_what_is_wrong_is_one_line_with_exit_code_2(kvloom, tmp_path, text, words, said):
    failed = kvloom("sweep", write(tmp_path, text), *words)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")
    assert said in failed.stderr
    assert not (tmp_path / "runs").exists()

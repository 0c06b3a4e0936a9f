from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvloom import _extras
from kvloom.bench import Pair, Shape, make_grid
from kvloom.bench import _ceilings as ceilings
from kvloom.bench import _timing as timing
from kvloom.bench._bytes import attend_bytes
from kvloom.kernels import backend

TINY = ["--device", "cpu", "--shapes", "B1x128,B2x64", "--pairs", "4:4,2:1", "--heads", "4/2", "--head-dim", "64"]
TIMED = {"seconds", "p10", "p90", "method", "nbytes", "bytes_per_s", "share_of_read", "share_of_copy", "copies"}
WHERE = {"kind", "id", "run", "device", "driver", "torch", "kvloom", "dtype", "when"}


@pytest.fixture
def bench(kvloom, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setattr(timing, "CPU_MAX_COPIES", 2)
    monkeypatch.setitem(ceilings._READ_BYTES, "cpu", 1 << 20)
    monkeypatch.chdir(tmp_path)
    one = backend(torch.device("cpu")).name
    return lambda *words: kvloom("bench", "kernels", "--backends", one, *words)


def test_table_records_and_picture(bench, tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = bench(*TINY, "--output", "runs/k.jsonl", "--plot", "roofline.png", "--window", "16")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-2:] == ["wrote runs/k.jsonl", "wrote roofline.png"]
    assert "B1x128 + 16 exact tokens, 4/2 heads of 64, float32" in done.stdout
    assert "B2x64 + 16 exact tokens" in done.stdout
    assert all(text in done.stdout for text in ("K4V4", "K2V1", "bytes allow", "Packing", "Appending", "dense: sdpa "))
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")

    records = [json.loads(line) for line in (tmp_path / "runs/k.jsonl").read_text().splitlines()]
    attends = [record for record in records if record["kind"] == "kernel_attend"]
    grid = make_grid(torch.device("cpu"), shapes="B1x128,B2x64", pairs="4:4,2:1", heads="4/2", head_dim=64, window=16)
    assert [record["nbytes"] for record in attends] == [
        attend_bytes(grid, shape, pair) for shape in (Shape(1, 128), Shape(2, 64)) for pair in (Pair(4, 4), Pair(2, 1))
    ]
    fields = {"times_bound", "times_dense", "bytes_allow", "error", "window", "page_tokens", "key_bits", "value_bits"}
    assert all(record.keys() >= TIMED | WHERE | fields for record in attends)
    assert all(record.keys() >= WHERE for record in records)


def test_json_is_the_records(bench, tmp_path: Path):
    done = bench(*TINY, "--json", "--output", "k.jsonl")
    assert done.exit_code == 0, done.output
    written = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert json.loads(done.stdout) == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "32K"], "--shapes: cannot read '32K'"),
        (["--shapes", "B1x100"], "--shapes B1x100"),
        (["--pairs", "4:7"], "--pairs 4:7: 7 bits"),
        (["--pairs", "4"], "--pairs: cannot read '4'"),
        (["--heads", "6/4"], "--heads 6/4"),
        (["--dtype", "fp8"], "dtype 'fp8' is not known"),
        (["--backends", "magic"], "on cpu --backends 'magic' is unknown; choose one of"),
        (["--key-group", "7"], "--key-group 7"),
        (["--head-dim", "20"], "--head-dim 20"),
        (["--plot", "roofline.doc"], "--plot roofline.doc"),
        (["--device", "abacus"], "--device 'abacus'"),
    ],
)
def test_mistakes_are_one_line(bench, tmp_path: Path, words: list[str], message: str):
    if words[0] == "--plot":
        pytest.importorskip("matplotlib")
    failed = bench(*TINY, *words)
    assert failed.exit_code == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(bench):
    failed = bench()
    assert failed.exit_code == 2
    assert failed.stderr == (
        "error: there is no GPU cuda here: --device cpu measures the CPU backends on smaller shapes.\n"
    )


def test_without_matplotlib_nothing_is_measured_in_vain(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extras, "_found", lambda module: module != "matplotlib")
    failed = bench(*TINY, "--plot", "roofline.png")
    assert failed.exit_code == 2
    assert failed.stderr == "error: The roofline picture needs matplotlib: run pip install 'kvloom[plot]'.\n"
    assert list(tmp_path.iterdir()) == []


def test_help(kvloom):
    assert " bench " in kvloom("--help").stdout
    assert "kernels" in kvloom("bench", "--help").stdout
    assert "kvloom bench kernels" in kvloom("bench", "kernels", "--help").stdout

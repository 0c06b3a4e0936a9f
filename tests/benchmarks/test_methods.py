"""The table of methods: its plans, and README.md as what the script makes of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks import methods
from benchmarks.methods import BEGIN, END, METHODS, PAGE, PEERS, PROFILED, WINDOW, Method
from kvloom.assets import EVALUATION, Text
from kvloom.demo import lineup
from kvloom.errors import DataError
from kvloom.evaluate._peers import BACKENDS, BITS
from kvloom.plan import Fingerprint, Window, full_pages, preset
from tests.demo.test_demo import profile

SMOLLM2 = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=30,
    packed_layers=tuple(range(30)),
    num_kv_heads=3,
    head_dim=64,
)
README = f"# A title\n\n{BEGIN}\nNot yet.\n{END}\n\nThe rest.\n"


def said(window: Window) -> str:
    return f"first {window.sinks}" if window.sinks else f"newest {window.recent}" if window.recent else ""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_plan_fits_and_its_window_is_as_the_row_says(method: Method):
    assert method.plan
    plan = method.plan(SMOLLM2)
    windows = {plan.spec(layer).window for layer in range(30)}
    assert {said(window) for window in windows} == {method.exact}
    for window in windows:
        pages = full_pages(window, WINDOW, PAGE)
        assert WINDOW - pages * PAGE == 7 + window.recent // PAGE * PAGE
    if "/" in method.name:
        assert plan == preset(method.name, SMOLLM2)


def test_plans_get_the_codebooks_and_rotations_that_they_need_from_calibration_texts(monkeypatch):
    read = []
    monkeypatch.setattr(methods, "load_model", lambda *name, **options: (None, "tokenizer"))
    monkeypatch.setattr(methods, "token_windows", lambda tokenizer, sources, *sizes, seed: [it.name for it in sources])
    monkeypatch.setattr(methods, "texts", lambda names: [Text(name, "") for name in names])
    monkeypatch.setattr(
        methods, "calibrate", lambda model, plan, names, rotate, texts: read.append((rotate, names)) or "made"
    )
    made = {method.name: methods._fitted(method.plan(SMOLLM2), method.rotates, "model") for method in METHODS}
    fitted = [name for name, plan in made.items() if plan == "made"]
    rotated = [f"calibrated rotations K{bits}V{bits} + sinks" for bits in (2, 3, 4)]
    assert fitted == ["nuq K2V2 + sinks", "nuq K3V3 + sinks", *rotated]
    assert [rotate for rotate, _ in read] == [False, False, True, True, True]
    assert not {name for _, names in read for name in names} & set(EVALUATION)


def test_rows_without_a_plan_have_the_names_of_contestants():
    entries = {entry.name: entry.plan for entry in lineup(profile(Window(sinks=4)), WINDOW, methods.BUDGETS)}
    assert {method.name: said(entries[method.name].spec(0).window) for method in PROFILED} == {
        method.name: method.exact for method in PROFILED
    }
    best = {f"{name} {bits}b, {axes[-1].label}" for name, axes in BACKENDS.items() for bits in BITS}
    assert {method.name for method in PEERS} == best
    names = [method.name for method in (*METHODS, *PROFILED, *PEERS)]
    assert len(set(names)) == len(names)


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def record(method: Method, **changes: object) -> dict[str, object]:
    """A fidelity record with all that the table reads."""
    layers = None
    if method.plan:
        entries = method.plan(SMOLLM2)
        layers = [
            {"layer": n, "key": entries.spec(n).key.label, "value": entries.spec(n).value.label} for n in range(30)
        ]
    elif method in PROFILED:
        layers = [
            {"layer": 0, "key": "2b/ch64", "value": "1b/tok-head"},
            {"layer": 1, "key": "3b/ch32", "value": "1b/tok-head"},
        ]
    return {
        "kind": "fidelity",
        "id": method.name,
        "name": method.name,
        "model": "SmolLM2-135M-Instruct",
        "device": "cpu",
        "dtype": "float32",
        "when": "2026-11-22T12:00:00Z",
        "text": {"names": ["a"], "sha256": "0"},
        "context": WINDOW,
        "windows": 35,
        "scored_tokens": 67410,
        "chunk": 128,
        "unscored": 128,
        "true_bits": 2.5462,
        "kld": interval(0.01234),
        "kld_p99": interval(0.1),
        "ppl": interval(20.0),
        "ppl_ratio": interval(1.25),
        "top1": interval(0.876),
        "layers": layers,
        "settings": {} if layers else {"backend": "hqq", "nbits": 2, "q_group_size": 64},
        "blocks": {"kld": [0.1]},
        **changes,
    }


def write(path: Path, records) -> None:
    path.write_text("".join(json.dumps(it) + "\n" for it in records), encoding="utf-8")


class Files(NamedTuple):
    """Results of every method, a README with the markers, and where the records go."""

    results: Path
    readme: Path
    kept: Path


@pytest.fixture
def files(tmp_path):
    files = Files(tmp_path / "results.jsonl", tmp_path / "README.md", tmp_path / "kept.jsonl")
    files.readme.write_text(README, encoding="utf-8")
    write(files.results, [record(method) for method in (*METHODS, *PROFILED, *PEERS)])
    return files


def test_the_table_goes_between_the_markers(files):
    methods.write_readme(*files)
    text = files.readme.read_text(encoding="utf-8")
    before, body, after = methods.between(text)
    assert before == f"# A title\n\n{BEGIN}"
    assert after == f"{END}\n\nThe rest.\n"
    figures = "2.55 | 0.0123 [0.0111, 0.0136] | 0.100 | 20.00 [18.00, 22.00] | 87.6 % |"
    lines = body.split("\n")
    rows = [line.split(" | ") for line in lines[2 : lines.index("")]]
    assert [row[0].strip("|` ") for row in rows] == [it.name for it in (*METHODS, *PROFILED, *PEERS)]
    assert lines[2] == (
        f"| `kivi/K2V2` | KIVI, arXiv 2402.02750 | affine 2b/ch32, affine 2b/tok32 | newest 128 | {figures}"
    )
    assert f"| exact 2.5 | kvloom | affine 2b to 3b, affine 1b/tok-head | first 4 | {figures}" in lines
    assert f"affine 2b/ch64, clipped 2b/tok-head | first 4 | {figures}" in body
    assert f"| hqq 2b, groups of 64 | newest, up to 128 | {figures}" in body
    legend = " ".join(lines[lines.index("") :])
    for fact in (
        "67,410 scored tokens",
        "device: cpu",
        "at 2,055 tokens (32 pages and 7 tokens)",
        "perplexity is 16.00",
    ):
        assert fact in legend
    methods.write_readme(files.kept, files.readme, files.kept)  # what was kept makes the same table, and the same file
    assert files.readme.read_text(encoding="utf-8") == text
    assert "blocks" not in files.kept.read_text(encoding="utf-8")


def test_rows_of_a_profile_may_be_absent_and_the_newest_comparable_results_count(files):
    old = [record(it, when="2026-11-21T12:00:00Z", context=580, id=f"old {it.name}") for it in (*METHODS, *PROFILED)]
    write(files.results, [*(record(method) for method in (*METHODS, *PEERS)), *old])
    methods.write_readme(*files)
    body = methods.between(files.readme.read_text(encoding="utf-8"))[1]
    assert "exact 2.5" not in body
    assert body.count("| 2.55 |") == len(METHODS) + len(PEERS)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "does not exist"),
        ([record(METHODS[0])], "has no results of kivi/K4V4, "),
        ([record(it, scored_tokens=1000) for it in (*METHODS, *PEERS)], "covers 1,000 scored tokens"),
    ],
)
def test_too_little_is_refused(files, lines, why):
    files.results.unlink()
    if lines:
        write(files.results, lines)
    with pytest.raises(DataError, match=why):
        methods.write_readme(*files)
    assert files.readme.read_text(encoding="utf-8") == README
    assert not files.kept.exists()


@pytest.mark.parametrize("text", ["# No markers\n", f"{END}\n{BEGIN}\n", README + README])
def test_a_readme_without_its_two_markers_is_refused(files, text):
    files.readme.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="once"):
        methods.write_readme(*files)
    assert files.readme.read_text(encoding="utf-8") == text


def test_readme_holds_what_the_script_makes_of_the_kept_results():
    kept = methods.KEPT
    expected = methods.table(methods.comparable(kept, methods.NEEDED)) if kept.exists() else methods.UNMEASURED
    assert methods.between(methods.README.read_text(encoding="utf-8"))[1] == expected

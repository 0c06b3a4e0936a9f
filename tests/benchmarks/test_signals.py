"""The page of signals is what the script makes of results, and names every signal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import methods, signals
from benchmarks.signals import BEGIN, END
from kvloom.errors import DataError
from kvloom.signals import signals as names_of_signals

NAMES = names_of_signals()  # before other tests register theirs
PAGE = f"# A title\n\n{BEGIN}\nNot yet.\n{END}\n\nThe rest.\n"


def group(rho: float) -> dict[str, Any]:
    own = {"value": rho, "low": rho - 0.1, "high": rho + 0.05}
    ends = {"true_bits": [2.9, 3.1], "kld": [0.01, 0.5]}
    return {"plans": 100, "spearman": own, "pearson": own, "pearson_log": own, **ends}


def record(name: str, equal: float, seconds: float) -> dict[str, Any]:
    return {
        "kind": "signal_comparison",
        "id": name,
        "name": name,
        "seconds": seconds,
        "prompts": 16,
        "prompt_tokens": 512,
        "spread": group(0.9),
        "equal": group(equal),
        "context": 1031,
        "windows": 8,
        "scored_tokens": 7216,
        "model": "a-model",
        "dtype": "float32",
        "device": "a GPU",
    }


RECORDS = [record("state_error", 0.4, 2.0), record("fisher", 0.6, 4.0), record("measured_kl", 0.8, 100.0)]


@pytest.fixture
def files(tmp_path):
    results, page = tmp_path / "signals.jsonl", tmp_path / "signals.md"
    plan = {"kind": "random_plan", "id": "p", "name": "p", "kld": 0.1}
    other = {"kind": "fidelity", "id": "f", "name": "f"}
    results.write_text("".join(json.dumps(it) + "\n" for it in [*RECORDS, plan, other]), encoding="utf-8")
    page.write_text(PAGE, encoding="utf-8")
    return results, page, tmp_path / "kept.jsonl"


def test_the_table_goes_between_the_markers_and_its_records_are_kept(files):
    _, page, kept = files
    signals.write_page(*files)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# A title\n\n{BEGIN}\n| signal |")
    assert text.endswith(f"{END}\n\nThe rest.\n")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `measured_kl`", "| `fisher`", "| `state_error`"]
    assert rows[1][1:4] == ["4", "0.900 [0.800, 0.950]", "0.900"]
    assert rows[1][4] == "0.600 [0.500, 0.650]"
    assert "`fisher` takes 1/25 of the time" in text.replace("\n", " ")
    assert [json.loads(line)["kind"] for line in kept.read_text().splitlines()] == ["signal_comparison"] * 3 + [
        "random_plan"
    ]
    signals.write_page(kept, page, kept)
    assert page.read_text(encoding="utf-8") == text


def test_without_the_truth_nothing_is_said_of_its_cost():
    assert "of the time" not in signals.table(RECORDS[:2])


def test_results_without_signals_are_refused(files):
    results, page, kept = files
    results.write_text(json.dumps({"kind": "fidelity", "id": "f", "name": "f"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="run kvloom signals compare first"):
        signals.write_page(*files)
    assert page.read_text(encoding="utf-8") == PAGE
    assert not kept.exists()


def test_the_page_holds_what_the_script_makes_of_the_kept_results():
    kept = signals.KEPT
    records = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept.exists() else []
    expected = signals.table(records) if records else signals.UNMEASURED
    assert methods.between(signals.PAGE.read_text(encoding="utf-8"), BEGIN, END)[1] == expected


def test_the_page_explains_every_signal():
    text = signals.PAGE.read_text(encoding="utf-8").split("## Which")[0]
    explained = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(any(f"`{name}`" in line.split(" | ")[0] for line in explained) for name in NAMES)

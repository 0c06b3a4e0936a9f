"""Tokens or bits: plans of equal bytes, scored by shares, and the page as what the script makes of results."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import essay_qa, methods, tokens_or_bits
from benchmarks.tokens_or_bits import BEGIN, BUDGETS, DENSE, END, FORMATS, PROMPT, PUBLISHED, Results, name_of
from kvloom.assets import Text
from kvloom.errors import DataError
from tests.benchmarks.test_methods import SMOLLM2, Files, interval, record, write
from tests.evaluate.tiny_llama import Letters, random_windows, tiny_model

README = f"# A title\n\n{BEGIN}\nNot yet.\n{END}\n\nThe rest.\n"
ROW = {"_id": "1", "input": "Which?", "context": "Hay. " * 20, "answers": ["Hay"], "all_classes": None}
WHOLE = {"K8V8": 8.5, "K4V4": 4.5, "K2V2": 2.5, "kvloom/K4V4": 4.5, "kvloom/K2V2": 2.5}


@pytest.fixture(scope="module")
def plans():
    return tokens_or_bits.plans(SMOLLM2, PROMPT)


def test_every_cell_has_a_plan_of_at_most_its_bytes(plans):
    whole = {name for name in plans if name in FORMATS}
    assert whole == {"K4V4", "K2V2", "kvloom/K4V4", "kvloom/K2V2"}
    for kept in PUBLISHED:
        for budget in BUDGETS:
            for stored in FORMATS:
                name = name_of(kept.policy, budget, stored)
                is_whole = name not in plans
                bits = plans[stored if is_whole else name].true_bits(PROMPT, "bfloat16")
                assert bits <= 16 / budget
                assert is_whole or bits > 0.95 * 16 / budget


def test_plans_keep_what_the_policy_and_the_format_say(plans):
    for kept in PUBLISHED:
        for stored in FORMATS:
            plan = plans[name_of(kept.policy, 64, stored)]
            entry = plan.layers[0]
            assert entry.evict
            assert (entry.evict.policy, entry.evict.parameters, entry.window) == (
                kept.policy,
                kept.parameters,
                kept.window,
            )
            assert (entry.key, entry.value) == (
                FORMATS[stored](SMOLLM2).layers[0].key,
                FORMATS[stored](SMOLLM2).layers[0].value,
            )
            assert plan.prefill == "exact"
    keys = plans["snapkv, 1/16, K2V2"].layers[0].key
    assert (keys.bits, keys.grouping) == (2, "per_channel")


def test_fewer_bits_keep_more_tokens(plans):
    for kept in PUBLISHED:
        names = [name_of(kept.policy, 16, stored) for stored in ("16 bits", "K8V8", "K4V4", "K2V2")]
        budgets = [plans[name].layers[0].evict.budget for name in names]
        assert budgets == sorted(set(budgets))
        assert budgets[-1] < 8 * budgets[0]


def needles(name: str, found: int, **changes: object):
    score = {"value": found / 18, "low": 0.0, "high": 1.0, "interval": "wilson"}
    about = {"model": "SmolLM2-135M-Instruct", "device": "cpu", "dtype": "float32", "when": "2026-11-22T12:00:00Z"}
    own = {"name": name, "id": name, "found": found, "total": 18, "score": score, "cases": [{"answer": "1"}]}
    return {"kind": "needle", **about, **own, **changes}


def answers(name: str, f1: float):
    """A record of questions."""
    score = {"value": f1, "low": 0.0, "high": 1.0, "interval": "bootstrap"}
    return needles(name, 0, kind="task", id=f"{name} answers", task="longbench/multifieldqa_en", total=24, score=score)


def results():
    """Records of every contestant: the more tokens, the better."""
    made = [(name, bits, 0.01) for name, bits in (("dense", 16.0), *WHOLE.items())]
    made += [
        (name_of(kept.policy, budget, stored), 16 / budget, 0.05 / n)
        for kept in PUBLISHED
        for budget in BUDGETS
        for n, stored in enumerate(FORMATS, 1)
        if stored not in WHOLE or budget * WHOLE[stored] > 16
    ]
    extra = {"windows": 32, "scored_tokens": 4096, "chunk": 1, "unscored": PROMPT, "prompt": PROMPT}
    scores = [
        record(methods.METHODS[0], name=name, id=name, true_bits=bits, kld=interval(kld), **extra)
        for name, bits, kld in made
    ]
    asked = [needles(name, n % 19) for n, (name, _, _) in enumerate(made)]
    return [*scores, *asked, *(answers(name, n % 100 / 100) for n, (name, _, _) in enumerate(made))]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    files = Files(folder, tmp_path / "eviction.md", tmp_path / "kept.jsonl")
    files.readme.write_text(README, encoding="utf-8")
    made = results()
    for n in range(2):
        write(folder / f"share-{n + 1}-of-2.jsonl", made[n::2])
    return files


def test_tables_and_picture_of_all_shares_go_on_the_page(files):
    pytest.importorskip("matplotlib")
    tokens_or_bits.write_page(*files)
    text = files.readme.read_text(encoding="utf-8")
    before, body, after = methods.between(text, BEGIN, END)
    assert (before, after) == (f"# A title\n\n{BEGIN}", f"{END}\n\nThe rest.\n")
    assert "(eviction.png)" in body
    assert files.readme.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for kept in PUBLISHED:
        table = body[body.index(f"| `{kept.policy}` |") :].split("\n")[: 2 + len(BUDGETS)]
        assert [line.split(" | ")[0] for line in table[2:]] == [f"| 1/{budget}" for budget in BUDGETS]
        first, last = (line.strip("| ").split(" | ") for line in (table[2], table[-1]))
        assert first[1].startswith("0.0500 [0.0450, 0.0550]; ")
        assert first[-1].startswith("**0.00833 [0.00750, 0.00917]**; ")
        assert [cell.endswith("(all tokens)") for cell in last[1:]] == [False, False, True, True, True, True]
        assert re.fullmatch(r"0\.0100 \[0\.00900, 0\.0110\]; \d+/18; 0\.\d\d \(all tokens\)", last[-1])
    legend = " ".join(body.split("\n\n")[-1].split())
    for fact in ("a prompt of 2,048 tokens", "4,096 tokens decoded", "32 windows", "finds 0 of 18", "24 questions"):
        assert fact in legend
    tokens_or_bits.write_page(files.kept, files.readme, files.kept)  # what was kept makes the same page and file
    assert files.readme.read_text(encoding="utf-8") == text
    kept = [json.loads(line) for line in files.kept.read_text(encoding="utf-8").splitlines()]
    assert len(kept) == len(results())
    assert not any({"cases", "blocks"} & it.keys() for it in kept)


@pytest.mark.parametrize(
    "lost",
    [("fidelity", "snapkv, 1/16, K2V2"), ("needle", "kvloom/K2V2"), ("task", "kvloom/K2V2"), ("fidelity", DENSE)],
)
def test_a_page_without_results_of_a_cell_is_refused(files, lost):
    for file in files.results.glob("*.jsonl"):
        file.unlink()
    write(files.results / "all.jsonl", [it for it in results() if (it["kind"], it["name"]) != lost])
    with pytest.raises(DataError, match=f"no .* of {re.escape(lost[1])}"):
        tokens_or_bits.write_page(*files)
    assert files.readme.read_text(encoding="utf-8") == README
    assert not files.kept.exists()


def test_shares_score_every_contestant_once_by_every_score(monkeypatch, tmp_path):
    model, script = tiny_model(), tokens_or_bits
    hay = Letters().text("A sentence of hay. ") * 50
    monkeypatch.setattr(script, "load_model", lambda *_, **__: (model, Letters()))
    monkeypatch.setattr(script, "texts", lambda _: [Text("hay", hay)])
    monkeypatch.setattr(script, "token_windows", lambda _t, _x, window, count, seed: random_windows(count, window))
    monkeypatch.setattr(script, "PUBLISHED", script.PUBLISHED[2:3])
    monkeypatch.setattr(script, "BUDGETS", (4,))
    monkeypatch.setattr(script, "FORMATS", {name: FORMATS[name] for name in ("16 bits", "K4V4", "K2V2")})
    monkeypatch.setattr(script, "SEEDS", range(1))
    monkeypatch.setattr(essay_qa, "rows", lambda *_: [ROW])
    names = []
    for n in (1, 2):
        options = ["--out", str(tmp_path), "--windows", "2", "--window", "829", "--share", f"{n}/2", "--batch", "2"]
        monkeypatch.setattr(sys, "argv", ["tokens_or_bits.py", *options])
        script.main()
        lines = (tmp_path / f"share-{n}-of-2.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        assert {(it["kind"], it.get("prompt"), it.get("total")) for it in found} == {
            ("fidelity", 700, None),
            ("needle", None, 3),
            ("task", None, 1),
        }
        names += [(it["kind"], it["name"]) for it in found]
    expected = [DENSE, "snapkv, 1/4, 16 bits", "snapkv, 1/4, K4V4", "K2V2"]
    assert sorted(names) == sorted((kind, name) for kind in ("fidelity", "needle", "task") for name in expected)


def test_the_page_holds_what_the_script_makes_of_the_kept_results():
    kept, page = tokens_or_bits.KEPT, tokens_or_bits.PAGE
    expected = tokens_or_bits.UNMEASURED
    if kept.exists():
        expected = tokens_or_bits.body(Results.load(kept), page.with_suffix(".png").name)
        assert page.with_suffix(".png").exists()
    assert methods.between(page.read_text(encoding="utf-8"), BEGIN, END)[1] == expected

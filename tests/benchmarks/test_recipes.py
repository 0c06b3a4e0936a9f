"""The table of recipes: budgets, the best of each side, and README.md as what the script makes of results."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import methods, recipes
from benchmarks.methods import WINDOW
from benchmarks.recipes import ALLOWANCE, BEGIN, BUDGETS, END, RECIPES
from kvloom.cache import LoomCache
from kvloom.errors import DataError
from kvloom.evaluate import Peers, Protocol, dense_contestant, paired_difference, peer_contestants
from kvloom.evaluate import _peers as peers
from kvloom.pages import page_tokens_of
from kvloom.plan import Fingerprint
from tests.benchmarks.test_methods import SMOLLM2, Files, interval, record, write
from tests.evaluate.tiny_llama import random_windows, tiny_model

WINDOWS = random_windows(1, 256)
README = f"# A title\n\n{BEGIN}\nNot yet.\n{END}\n\nThe rest.\n"
QUANTO = {"backend": "quanto", "nbits": 2, "q_group_size": 64}
OTHER = {"package": "turboquant", "version": "0.2.0", "stated": True}


def result(name: str, bits: float, kld: float, settings: dict[str, Any] | None = None, **changes: Any):
    """A fidelity record of a recipe, or of a package whose settings are given."""
    blocks = {"size": 128, "tokens": [128, 127, 128], "kld": [0.9 * kld, kld, 1.1 * kld], "nll": [1.0, 2.0, 3.0]}
    own = {"name": name, "id": name, "true_bits": bits, "kld": interval(kld), "blocks": blocks, "layers": None}
    return record(methods.METHODS[0], **{**own, "settings": settings or {}, **changes})


def results():
    """Every recipe at its true bits, and three settings of packages."""
    ours = [result(it.name, it.plan(SMOLLM2).true_bits(WINDOW, "bfloat16"), 0.1 / n) for n, it in enumerate(RECIPES, 1)]
    return [
        *ours,
        result("turboquant K2V2", 2.25, 0.5, OTHER),
        result("quanto 2b, best axes", 2.5 + ALLOWANCE, 0.2, QUANTO),
        result("quanto 4b, best axes", 4.25 + ALLOWANCE + 1e-9, 0.001, QUANTO),
    ]


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_has_a_recipe_that_is_close_to_it_from_below(budget):
    bits = [recipe.plan(SMOLLM2).true_bits(WINDOW, "bfloat16") for recipe in RECIPES]
    assert max(it for it in bits if it <= budget) > budget - 0.1


def test_recipes_are_uniform_and_keep_four_sinks_and_an_unfilled_page_of_at_most_a_pass_exactly():
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        plan = recipe.plan(SMOLLM2)
        assert page_tokens_of(recipe.key.format(64), recipe.value.format(64)) <= Protocol().chunk
        assert len(plan.layers) == 1
        assert (plan.layers[0].window, plan.layers[0].heads) == (methods.FOUR, {})
        assert (plan.layers[0].key, plan.layers[0].value) == (recipe.key, recipe.value)


def test_recipes_run():
    model = tiny_model(kv_heads=1)
    states = torch.randn(1, 1, 300, 32, generator=torch.Generator().manual_seed(0))
    for recipe in RECIPES:
        plan = recipe.plan(Fingerprint.of(model))
        cache = LoomCache(plan, model)
        for layer in plan.model.packed_layers:
            cache.update(states, states, layer)
        assert cache.nbytes() == plan.nbytes(1, 300, "float32")


def test_contestants_are_recipes_peers_within_the_largest_budget_and_packages(monkeypatch, capsys):
    model = tiny_model()
    monkeypatch.setattr(peers, "why_not", lambda backend, model: None)
    (own,) = [it for it in peer_contestants(model, bits=(4,)).contestants if it.name == "quanto 4b, as it comes"]
    monkeypatch.setattr(recipes, "package_contestants", lambda model: Peers((own,), ("A package is left out.",)))
    found = [it.name for it in recipes.contestants(model)]
    two = ["2b, best axes, groups of 32", "2b, best axes", "2b, best axes, groups of 128"]
    three = [it.replace("2b, best axes", "3b, as it comes") for it in two]
    four = "4b, best axes, groups of 128"
    assert found == [
        *(recipe.name for recipe in RECIPES),
        *(f"quanto {it}" for it in (*two, four)),
        *(f"hqq {it}" for it in (*three, *two, four)),
        own.name,
    ]
    assert "A package is left out." in capsys.readouterr().out


def test_each_side_is_its_best_within_the_budget():
    rows = {it["name"]: it for it in results()}
    names = [recipe.name for recipe in RECIPES]
    turboquant, quanto = "turboquant K2V2", "quanto 2b, best axes"
    theirs = {2.25: turboquant, 2.5: quanto, 2.75: quanto, 3.25: quanto, 4.25: quanto}
    for row in recipes.best(rows):
        within = [rows[name]["kld"]["value"] for name in names if rows[name]["true_bits"] <= row.budget]
        assert row.ours["kld"]["value"] == min(within)
        assert row.theirs["name"] == theirs[row.budget]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    files = Files(folder, tmp_path / "README.md", tmp_path / "kept.jsonl")
    files.readme.write_text(README, encoding="utf-8")
    made = results()
    for n in range(3):
        write(folder / f"share-{n + 1}-of-3.jsonl", made[n::3])
    (folder / "share-1-of-3.jsonl.pieces").write_text("{}\n", encoding="utf-8")
    return files


def test_the_table_of_all_shares_goes_between_the_markers(files):
    recipes.write_readme(*files)
    text = files.readme.read_text(encoding="utf-8")
    before, body, after = methods.between(text, BEGIN, END)
    assert (before, after) == (f"# A title\n\n{BEGIN}", f"{END}\n\nThe rest.\n")
    lines = body.split("\n")
    rows = [line.strip("| ").split(" | ") for line in lines[2 : lines.index("")]]
    assert [row[0] for row in rows] == [f"{budget:g}" for budget in BUDGETS]
    assert rows[0] == [
        "2.25",
        f"`{RECIPES[0].name}`",
        "2.23",
        "0.100 [0.0900, 0.110]",
        "turboquant K2V2",
        "2.25 (stated)",
        "0.500 [0.450, 0.550]",
        "0.20 [0.20, 0.20]",
    ]
    assert rows[1][4:7] == ["`QuantizedCache`, quanto 2b, best axes", "2.56", "0.200 [0.180, 0.220]"]
    legend = " ".join(lines[lines.index("") :])
    for fact in (
        "67,410 scored tokens",
        "at 2,055 tokens (32 pages and 7 tokens)",
        "at most 0.0625 more",
        f"{len(RECIPES)} uniform plans and of 3 settings of `QuantizedCache` on quanto, turboquant 0.2.0 (not scored "
        "here: kakeyalattice, nexusquant-kv, tiny-turboquant).",
    ):
        assert fact in legend
    recipes.write_readme(files.kept, files.readme, files.kept)  # what was kept makes the same table, and the same file
    assert files.readme.read_text(encoding="utf-8") == text
    kept = [json.loads(line) for line in files.kept.read_text(encoding="utf-8").splitlines()]
    assert {it["name"] for it in kept} == {it["name"] for it in results()}
    compared = {cell.strip("`") for row in rows for cell in (row[1], row[4].removeprefix("`QuantizedCache`, "))}
    assert {it["name"] for it in kept if "blocks" in it} == compared < {it["name"] for it in kept}


def test_the_ratio_is_paired():
    ours = result("a", 2.0, 0.1, blocks={"tokens": [128, 128], "kld": [0.05, 0.15]})
    theirs = result("b", 2.0, 0.2, blocks={"tokens": [128, 128], "kld": [0.1, 0.3]})
    row = recipes.Row(2.25, ours, theirs)
    assert recipes._line(row).endswith("| 0.50 [0.50, 0.50] |")
    ratio = paired_difference(ours, theirs)["ratio"]
    assert ratio == {"value": 0.5, "low": pytest.approx(0.5), "high": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("drop", "why"),
    [
        ((RECIPES[0].name,), "No uniform plan has results at 2.25 true bits or fewer: run benchmarks/recipes.py"),
        (("turboquant K2V2",), "No package has results at 2.3125 true bits or fewer"),
    ],
)
def test_too_little_is_refused(files, drop, why):
    for file in files.results.glob("*.jsonl"):
        file.unlink()
    write(files.results / "all.jsonl", [it for it in results() if it["name"] not in drop])
    with pytest.raises(DataError, match=why):
        recipes.write_readme(*files)
    assert files.readme.read_text(encoding="utf-8") == README
    assert not files.kept.exists()


def test_shares_score_every_contestant_once_into_their_files(monkeypatch, tmp_path):
    model = tiny_model()
    five = [replace(dense_contestant(model), name=name) for name in "abcde"]
    monkeypatch.setattr(methods, "load_model", lambda *_, **__: (model, None))
    monkeypatch.setattr(methods, "texts", lambda _: ())
    monkeypatch.setattr(methods, "token_windows", lambda _tokenizer, _texts, window, count, seed: WINDOWS[:, :window])
    monkeypatch.setattr(recipes, "contestants", lambda _: five)
    for n in (1, 2):
        options = ["--out", str(tmp_path), "--windows", "1", "--window", "256", "--share", f"{n}/2"]
        monkeypatch.setattr(sys, "argv", ["recipes.py", *options])
        recipes.main()
    found = {
        file.name: [json.loads(line)["name"] for line in file.read_text(encoding="utf-8").splitlines()]
        for file in tmp_path.glob("*.jsonl")
    }
    assert found == {"share-1-of-2.jsonl": ["a", "c", "e"], "share-2-of-2.jsonl": ["b", "d"]}


@given(st.integers(1, 40), st.integers(0, 40))
def test_a_share_is_read_as_its_two_numbers(first, more):
    assert methods.share(f"{first}/{first + more}") == (first, first + more)


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "a/2", "1/2/3"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="such as 2/8"):
        methods.share(text)


def test_readme_holds_what_the_script_makes_of_the_kept_results():
    kept = recipes.KEPT
    expected = recipes.table(recipes.comparable(kept, ())) if kept.exists() else recipes.UNMEASURED
    assert methods.between(methods.README.read_text(encoding="utf-8"), BEGIN, END)[1] == expected

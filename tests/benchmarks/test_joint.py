"""Joint plans beside the grid: equal bytes, scored by shares, and the page as what the script makes of results."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import essay_qa, joint, methods, tokens_or_bits
from benchmarks.joint import BEGIN, BUDGETS, DENSE, END, GRID, POLICIES, Results, grid_name, joint_name
from benchmarks.tokens_or_bits import PROMPT
from kvloom import Profile, TensorSpec
from kvloom.assets import Text
from kvloom.errors import DataError, PlanError
from kvloom.plan import Fingerprint
from kvloom.signals import FOUR_SINKS, compute_eviction, compute_profile, default_candidates
from tests.benchmarks.test_methods import SMOLLM2, Files, interval, record, write
from tests.benchmarks.test_tokens_or_bits import ROW, answers, needles
from tests.evaluate.tiny_llama import Letters, random_windows, tiny_model

README = f"# A title\n\n{BEGIN}\nNot yet.\n{END}\n\nThe rest.\n"
SPECS = {
    "key_specs": [TensorSpec(bits=b, grouping="per_channel", group_size=64) for b in (2, 4)],
    "value_specs": [TensorSpec(bits=b, grouping="per_token", group_size="head_dim") for b in (2, 4)],
}


@pytest.fixture(scope="module")
def profile() -> Profile:
    model = tiny_model()
    table = compute_eviction(model, random_windows(1, 900), candidates=default_candidates(["snapkv"]))
    return compute_profile(model, random_windows(1, 128), window=FOUR_SINKS, **SPECS).with_eviction(table)


def test_every_grid_point_has_at_most_its_bytes():
    plans = joint.grid(SMOLLM2, PROMPT)
    assert len(plans) == len(BUDGETS) * len(POLICIES) * len(GRID)
    for budget in BUDGETS:
        for kept in POLICIES:
            for stored in GRID:
                plan = plans[grid_name(kept.policy, budget, stored)]
                assert 0.95 * 16 * budget < plan.true_bits(PROMPT, "bfloat16") <= 16 * budget


def test_joint_plans_have_at_most_the_grids_bytes(profile: Profile):
    prompt = 900
    plans = joint.joint(profile, prompt)
    assert set(plans) == {joint_name(policy, budget) for policy in ("auto", "snapkv") for budget in BUDGETS}
    dense = 2 * 2 * 2 * 32 * 2  # bytes of a token: layers, sides, KV heads, channels, bfloat16
    for budget in BUDGETS:
        plan = plans[joint_name("auto", budget)]
        assert 0.8 * int(budget * prompt) * dense < plan.nbytes(1, prompt, "bfloat16") <= int(budget * prompt) * dense


def test_a_profile_without_evictions_is_refused(profile: Profile):
    with pytest.raises(PlanError, match="no losses of evictions"):
        joint.joint(profile.model_copy(update={"eviction": None}), PROMPT)


def results():
    """Records of every contestant: joint plans lose half of what the best grid point does."""
    made = [(DENSE, 16.0, 0.0)]
    for budget in BUDGETS:
        made += [
            (grid_name(kept.policy, budget, stored), 16 * budget, 0.103 - 0.001 * n)
            for n, (kept, stored) in enumerate((kept, stored) for kept in POLICIES for stored in GRID)
        ]
        made += [(joint_name("auto", budget), 16 * budget, 0.02), (joint_name("snapkv", budget), 16 * budget, 0.03)]
    extra = {"windows": 32, "scored_tokens": 4096, "chunk": 1, "unscored": PROMPT, "prompt": PROMPT}
    scores = [
        record(
            methods.METHODS[0],
            name=name,
            id=name,
            true_bits=bits,
            kld=interval(kld),
            blocks={"size": 128, "tokens": [128, 128], "kld": [kld, kld]},
            **extra,
        )
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


def test_the_table_of_all_shares_goes_on_the_page(files):
    joint.write_page(*files)
    text = files.readme.read_text(encoding="utf-8")
    before, body, after = methods.between(text, BEGIN, END)
    assert (before, after) == (f"# A title\n\n{BEGIN}", f"{END}\n\nThe rest.\n")
    rows = [line.strip("|").split("|") for line in body.split("\n")[2:10]]
    rows = [[cell.strip() for cell in row] for row in rows]
    bests = ["best published: expected_attention, K2V2", "best of the grid: snap_expected, kvloom/K3V3"]
    assert [row[1] for row in rows] == [*bests, "joint, auto", "joint, snapkv"] * 2
    assert [row[0] for row in rows] == ["5 %"] * 4 + ["12.5 %"] * 4
    assert [row[2].split()[0] for row in rows[:4]] == ["0.0520", "0.0400", "0.0200", "0.0300"]
    assert rows[0][3:5] == rows[1][3:5] == ["", ""]
    assert rows[2][3:5] == ["0.38 [0.38, 0.38]", "0.50 [0.50, 0.50]"]
    assert rows[3][3:5] == ["0.58 [0.58, 0.58]", "0.75 [0.75, 0.75]"]
    assert re.fullmatch(r"\d+/18; 0\.\d\d", rows[0][-1])
    legend = " ".join(body.split("\n\n")[-1].split())
    for fact in (
        "a prompt of 2,048 tokens",
        "4,096 tokens decoded",
        "32 windows",
        "the least of 28 points",
        "of 64, with",
    ):
        assert fact in legend
    joint.write_page(files.kept, files.readme, files.kept)  # what was kept makes the same page
    assert files.readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("lost", [("fidelity", "joint, 5 %, auto"), ("needle", "joint, 5 %, snapkv")])
def test_a_page_without_results_of_a_plan_is_refused(files, lost):
    for file in files.results.glob("*.jsonl"):
        file.unlink()
    write(files.results / "all.jsonl", [it for it in results() if (it["kind"], it["name"]) != lost])
    with pytest.raises(DataError, match=f"no .* of {re.escape(lost[1])}"):
        joint.write_page(*files)
    assert files.readme.read_text(encoding="utf-8") == README
    assert not files.kept.exists()


def test_shares_score_every_contestant_once_by_every_score(monkeypatch, tmp_path, profile: Profile):
    model = tiny_model()
    assert Fingerprint.of(model) == profile.model
    hay = Letters().text("A sentence of hay. ") * 50
    monkeypatch.setattr(tokens_or_bits, "load_model", lambda *_, **__: (model, Letters()))
    monkeypatch.setattr(tokens_or_bits, "texts", lambda _: [Text("hay", hay)])
    monkeypatch.setattr(tokens_or_bits, "token_windows", lambda _t, _x, long, many, seed: random_windows(many, long))
    monkeypatch.setattr(joint, "POLICIES", POLICIES[2:3])
    monkeypatch.setattr(joint, "BUDGETS", (0.2,))
    monkeypatch.setattr(joint, "GRID", {"K4V4": GRID["K4V4"]})
    monkeypatch.setattr(tokens_or_bits, "SEEDS", range(1))
    monkeypatch.setattr(essay_qa, "rows", lambda *_: [ROW])
    profile.save(tmp_path / "profile.json")
    names = []
    for n in (1, 2):
        options = [
            "--windows",
            "1",
            "--window",
            "829",
            "--share",
            f"{n}/2",
            "--profile",
            str(tmp_path / "profile.json"),
        ]
        monkeypatch.setattr(sys, "argv", ["joint.py", "--out", str(tmp_path / "out"), *options])
        joint.main()
        lines = (tmp_path / "out" / f"share-{n}-of-2.jsonl").read_text(encoding="utf-8").splitlines()
        names += [(it["kind"], it["name"]) for it in map(json.loads, lines)]
    expected = [DENSE, "snapkv, 20 %, K4V4", "joint, 20 %, auto", "joint, 20 %, snapkv"]
    assert sorted(names) == sorted((kind, name) for kind in ("fidelity", "needle", "task") for name in expected)


def test_a_profile_is_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["joint.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="give --profile"):
        joint.main()


def test_the_page_holds_what_the_script_makes_of_the_kept_results():
    expected = joint.body(Results.load(joint.KEPT)) if joint.KEPT.exists() else joint.UNMEASURED
    assert methods.between(joint.PAGE.read_text(encoding="utf-8"), BEGIN, END)[1] == expected

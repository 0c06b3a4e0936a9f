"""The jobs of a sweep, and what makes one another job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvloom import Plan, compute_profile
from kvloom.errors import DataError, ModelError, PlanError
from kvloom.plan import Evict
from kvloom.sweep import BudgetEntry, LmEvalEntry, ModelEntry, Sweep, TaskEntry, make_jobs


def sweep(home: Path, plans=(), tasks=("fidelity",), models=("tiny",), **more) -> Sweep:
    entries = [TaskEntry(task=it, windows=1, window=300) if isinstance(it, str) else it for it in tasks]
    return Sweep(models=[str(home / model) for model in models], plans=plans, tasks=entries, **more)


def test_every_cache_of_every_model_on_every_task(home):
    niah = TaskEntry(task="ruler/vt", lengths=(256, 512), limit=1)
    made = make_jobs(sweep(home, [str(home / "k2-{model}.json"), "kvloom/K4V4"], ["fidelity", niah], ("tiny", "deep")))
    assert [job.name for job in made.jobs] == [
        f"{model}, {task}, {plan}"
        for model in ("tiny", "deep")
        for task in ("fidelity", "ruler/vt")
        for plan in ("dense", f"k2-{model}", "kvloom/K4V4")
    ]
    assert {job.prefill for job in made.jobs} == {"quantized"}
    assert made.plans["deep"]["k2-deep"].model.num_layers == 3
    assert len({job.results for job in made.jobs}) == len(made.jobs)
    assert not made.notes


def test_groups_become_tasks_and_keep_their_name(home):
    pytest.importorskip("wonderwords")
    made = make_jobs(sweep(home, tasks=[TaskEntry(task="ruler", name="short", lengths=(512,), limit=1)]))
    names = [job.task.label for job in made.jobs]
    assert len(names) == 11  # qa_1 and qa_2 need files
    assert "short/niah_single_1" in names
    assert len(made.notes) == 2
    assert made.notes[0].startswith("ruler/qa_1 is left out")


def test_lm_eval_tasks_are_known_and_apart(home):
    pytest.importorskip("lm_eval")
    made = make_jobs(sweep(home, tasks=[LmEvalEntry(tasks=("arc_easy", "hellaswag"))]))
    assert [job.task.label for job in made.jobs] == ["lm-eval/arc_easy", "lm-eval/hellaswag"]
    with pytest.raises(DataError, match=r"lm-eval task 'arc_uneasy' is unknown; choose one of .*arc_easy"):
        make_jobs(sweep(home, tasks=[LmEvalEntry(tasks=("arc_uneasy",))]))


def test_budgets_become_exact_plans(home):
    import torch

    from kvloom import load_model

    model, _ = load_model(home / "tiny", device="cpu")
    profile = compute_profile(model, torch.randint(0, 1000, (1, 128)))
    profile.save(home / "profile-tiny.json")
    made = make_jobs(sweep(home, [BudgetEntry(bits=4, profile=str(home / "profile-{model}.json"), tokens=2048)]))
    plan = made.plans["tiny"]["exact 4"]
    assert plan.provenance.solver == "exact"
    assert plan.true_bits(2048) <= 4


def test_where_a_plan_evicts_all_are_scored_after_a_prompt(home, tmp_path):
    plan = Plan.load(home / "k2-tiny.json")
    entry = plan.layers[0].model_copy(update={"evict": Evict(policy="snapkv", budget=0.25)})
    plan.model_copy(update={"layers": (entry,)}).save(tmp_path / "few.json")
    made = make_jobs(sweep(home, [str(tmp_path / "few.json"), "kvloom/K4V4"]))
    assert {job.prefill for job in made.jobs} == {"exact"}
    assert all(job.task.settings.after_prompt for job in made.jobs)
    assert made.notes == ("A plan for tiny evicts: all its plans read prompts exactly.",)


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"plans": ["k2-deep.json"]}, ModelError, "plan 'k2-deep' of tiny: the plan is for num_layers = 3"),
        ({"plans": ["k2-gone.json"]}, PlanError, "cannot read the plan"),
        ({"plans": ["kvloom/K9V9"]}, PlanError, "preset 'kvloom/K9V9' is unknown"),
        ({"plans": ["kvloom/K4V4", "kvloom/K4V4"]}, DataError, "plans of tiny: 'kvloom-K4V4' is there twice"),
        ({"plans": [BudgetEntry(bits=3, profile="no.json")]}, DataError, "cannot read the profile no.json"),
        ({"plans": [BudgetEntry(bits=3, profile="no.json", name="dense")]}, DataError, "cannot read"),
        ({"tasks": ["gsm9k"]}, DataError, "task 'gsm9k' is unknown"),
        ({"tasks": ["fidelity", "fidelity"]}, DataError, "tasks: 'fidelity' is there twice"),
        ({"models": ["tiny", "tiny"]}, DataError, "models: 'tiny' is there twice"),
        ({"models": ["gone"]}, ModelError, "gone"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(home, wrong, kind, said):
    plans = [str(home / it) if isinstance(it, str) and it.endswith("json") else it for it in wrong.pop("plans", ())]
    with pytest.raises(kind, match=said.replace("(", r"\(")):
        make_jobs(sweep(home, plans, **wrong))


def test_a_key_depends_on_settings_plan_and_files_alone(home, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 200)

    def key(plan="k2-tiny.json", touched=None, **settings) -> str:
        if touched:
            os.utime(touched, ns=(1, 1))
        task = TaskEntry(task="fidelity", texts=(str(text),), **settings)
        made = make_jobs(sweep(home, [str(home / plan)], [task]))
        return made.jobs[1].key(made.plans["tiny"][made.jobs[1].plan])

    first = key()
    assert key() == first
    assert key(windows=3) != first
    other = Plan.load(home / "k2-tiny.json").model_copy(update={"prefill": "quantized"})
    keep = (home / "k2-tiny.json").read_text()
    other.save(home / "k2-tiny.json")
    assert key() != first
    (home / "k2-tiny.json").write_text(keep)
    assert key() == first
    assert key(touched=text) != first


def test_a_model_by_another_dtype_is_another_model(home):
    half = ModelEntry(model=str(home / "tiny"), name="half", dtype="bfloat16")
    made = make_jobs(Sweep(models=[str(home / "tiny"), half], tasks=[TaskEntry(task="fidelity")]))
    assert [job.name for job in made.jobs] == ["tiny, fidelity, dense", "half, fidelity, dense"]

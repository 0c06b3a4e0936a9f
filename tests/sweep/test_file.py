"""Sweep files: what they may say, and one sentence with the field where they are wrong."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvloom.errors import DataError
from kvloom.evaluate import Settings
from kvloom.sweep import BudgetEntry, Job, LmEvalEntry, ModelEntry, Sweep, TaskEntry


def load(folder: Path, text: str) -> Sweep:
    (folder / "sweep.yaml").write_text(text)
    return Sweep.load(folder / "sweep.yaml")


def test_names_stand_for_entries_and_paths_start_at_the_file(tmp_path):
    (tmp_path / "local").mkdir()
    read = load(
        tmp_path,
        """
        models: [smollm2-135m, local, ./gone, org/hub, {model: local, name: half, dtype: bfloat16}]
        plans: ["plans/{model}.json", kvloom/K4V4, {bits: 3, profile: "p/{model}.json"}]
        tasks:
          - fidelity
          - {task: needle, name: long, lengths: [8K], texts: [worked, mine.txt], data: sets}
          - {lm-eval: [mmlu, hellaswag], shots: 0, include: more}
        prefill: plan
        """,
    )
    assert [it.model for it in read.models] == [
        "smollm2-135m",
        str(tmp_path / "local"),
        str(tmp_path / "gone"),
        "org/hub",
        str(tmp_path / "local"),
    ]
    assert [it.label for it in read.models] == ["smollm2-135m", "local", "gone", "hub", "half"]
    assert read.plans[:2] == (str(tmp_path / "plans/{model}.json"), "kvloom/K4V4")
    assert read.plans[2] == BudgetEntry(bits=3, profile=str(tmp_path / "p/{model}.json"))
    assert read.plans[2].label == "exact 3"
    assert read.tasks == (
        TaskEntry(task="fidelity"),
        TaskEntry(
            task="needle",
            name="long",
            lengths=(8192,),
            texts=("worked", str(tmp_path / "mine.txt")),
            data=tmp_path / "sets",
        ),
        LmEvalEntry(tasks=("mmlu", "hellaswag"), shots=0, include=tmp_path / "more"),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [a]\ntasks: [fidelity]\nplan: [x.json]", "field plan: nothing is known by this name"),
        ("models: []\ntasks: [fidelity]", "field models"),
        ("tasks: [fidelity]", "field models: Field required"),
        ("models: [a]\ntasks: [{task: gsm8k, limits: 2}]", "field tasks.0.task.limits: nothing is known by this name"),
        ("models: [a]\ntasks: [{task: gsm8k, limit: 0}]", "field tasks.0.task: limit is 0"),
        ("models: [a]\ntasks: [{task: ruler, lengths: []}]", "field tasks.0.task: lengths is []"),
        ("models: [a]\ntasks: [{task: ruler, lengths: [4G]}]", "field tasks.0.task.lengths.0: cannot read '4G'"),
        ("models: [a]\ntasks: [{lm-eval: []}]", "field tasks.0.lm-eval.lm-eval"),
        ("models: [a]\ntasks: [fidelity, 3]", "field tasks.1.task"),
        ("models: [a]\nplans: [{bits: 3}]\ntasks: [fidelity]", "field plans.0.budget.profile: Field required"),
        ("models: [a]\nplans: [{bits: 0, profile: p}]\ntasks: [fidelity]", "field plans.0.budget.bits"),
        ("models: [{model: a, dtype: int8}]\ntasks: [fidelity]", "field models.0.dtype"),
        ("models: [a]\ntasks: [fidelity]\nprefill: none", "field prefill"),
        ("models: a\ntasks: [fidelity]", "field models"),
        ("models: [a", "is not YAML"),
        ("- a", "sweep.yaml"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_field(tmp_path, text, said):
    with pytest.raises(DataError) as error:
        load(tmp_path, text)
    assert said in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "sweep.yaml"))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"sweep 'no\.yaml' cannot be read \(No such file"):
        Sweep.load("no.yaml")


def test_tasks_take_all_settings_with_their_defaults():
    assert set(TaskEntry.model_fields) == {field.name for field in fields(Settings)} | {"task", "name"}
    assert TaskEntry(task="fidelity").settings == Settings()


tasks = st.one_of(
    st.builds(
        TaskEntry,
        task=st.sampled_from(["gsm8k", "ruler/vt"]),
        limit=st.none() | st.integers(1, 9),
        lengths=st.none() | st.lists(st.integers(2, 99), min_size=1),
        windows=st.none() | st.integers(1, 9),
        data=st.none() | st.just(Path("data")),
    ),
    st.builds(LmEvalEntry, tasks=st.just(("mmlu",)), shots=st.none() | st.integers(0, 5), chat=st.booleans()),
)


@example(Job(model=ModelEntry(model=".."), plan="..", task=TaskEntry(task="../.."), prefill=None))
@given(
    st.builds(
        Job,
        model=st.builds(ModelEntry, model=st.text(min_size=1), dtype=st.sampled_from([None, "float32"])),
        plan=st.none() | st.text(min_size=1),
        task=tasks,
        prefill=st.sampled_from([None, "exact", "quantized"]),
    )
)
def test_jobs_survive_the_way_to_a_worker_and_have_a_safe_place(job):
    assert Job.model_validate_json(job.model_dump_json(by_alias=True)) == job
    assert len(job.results.parts) == 4
    assert not any(part.startswith(".") for part in job.results.parts)

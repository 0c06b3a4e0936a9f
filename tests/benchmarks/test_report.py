"""`benchmarks/report.yaml` is a sweep that can begin."""

from __future__ import annotations

from pathlib import Path

from kvloom.assets import MODEL_NAME
from kvloom.sweep import Sweep, make_jobs


def test_the_sweep_of_the_report_has_its_plans_and_tasks(fetched):
    read = Sweep.load(Path(__file__).parents[2] / "benchmarks" / "report.yaml")
    assert len(read.models) == 2
    packaged = [model for model in read.models if model.model == MODEL_NAME]
    made = make_jobs(read.model_copy(update={"models": tuple(packaged)}))
    assert len(made.plans[MODEL_NAME]) == 5
    assert {job.task.task.partition("/")[0] for job in made.jobs} == {"fidelity", "needle", "ruler", "gsm8k"}

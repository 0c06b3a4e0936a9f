"""The jobs of a sweep, checked: models, plans and tasks are known before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvloom import Budget, Plan, Profile
from kvloom.allocate import allocate
from kvloom.assets import load_config
from kvloom.errors import DataError, ModelError
from kvloom.evaluate import choose, shared_prefill
from kvloom.plan import Fingerprint, find_plan
from kvloom.sweep._config import MODEL, BudgetEntry, LmEvalEntry, ModelEntry, Sweep, TaskEntry
from kvloom.sweep._job import DENSE, Job, as_file

Plans = Mapping[str, Plan]


@dataclass(frozen=True)
class Jobs:
    """The jobs of a sweep.

    Attributes:
        jobs: in the order of models, tasks and plans, each task with the uncompressed cache first.
        plans: of every model, by its label and their names.
        notes: a sentence on everything that is done otherwise than one might think.
    """

    jobs: tuple[Job, ...]
    plans: Mapping[str, Plans]
    notes: tuple[str, ...]


def make_jobs(sweep: Sweep) -> Jobs:
    """Split a sweep into jobs.

    Raises:
        DataError: a task is not known or its data is not here, or two entries would share a folder.
        MissingExtraError: a task needs a package that is not installed.
        ModelError: a model is not found, or a plan is for another.
        PlanError: a plan is not found, or its budget cannot be met.
    """
    tasks, notes = _tasks(sweep)
    _check_distinct("models", [model.label for model in sweep.models])
    _check_distinct("tasks", [task.label for task in tasks])
    plans = {model.label: _plans(sweep, model) for model in sweep.models}
    jobs: list[Job] = []
    for model in sweep.models:
        own = plans[model.label]
        wanted = None if sweep.prefill == "plan" else sweep.prefill
        prefill = shared_prefill(own.values(), wanted)
        if prefill != wanted:
            notes.append(f"A plan for {model.label} evicts: all its plans read prompts exactly.")
        evicts = any(entry.evict for plan in own.values() for entry in plan.layers)
        jobs += [
            Job(model=model, plan=name, task=_scored(task, evicts), prefill=prefill)
            for task in tasks
            for name in (None, *own)
        ]
    return Jobs(tuple(jobs), plans, tuple(notes))


def _tasks(sweep: Sweep) -> tuple[list[TaskEntry | LmEvalEntry], list[str]]:
    """Single tasks in place of groups, and what is to be said about them."""
    tasks: list[TaskEntry | LmEvalEntry] = []
    notes: list[str] = []
    for entry in sweep.tasks:
        if isinstance(entry, LmEvalEntry):
            _check_lm_eval(entry)
            tasks += map(entry.member, entry.tasks)
            continue
        chosen = choose([entry.task], entry.settings)
        tasks += map(entry.member, dict.fromkeys(task.name for task in chosen.tasks))
        notes += chosen.notes
    return tasks, notes


def _check_lm_eval(entry: LmEvalEntry) -> None:
    from kvloom.integrations.lm_eval import check_tasks

    check_tasks(entry.tasks, entry.include)


def _scored(task: TaskEntry | LmEvalEntry, evicts: bool) -> TaskEntry | LmEvalEntry:
    """The task as all caches of a model are scored on it."""
    if isinstance(task, LmEvalEntry) or not evicts:
        return task
    return task.model_copy(update={"after_prompt": True})


def _plans(sweep: Sweep, model: ModelEntry) -> dict[str, Plan]:
    shape = load_config(model.model)
    found = [_plan(entry, model, shape) for entry in sweep.plans]
    for name, plan in found:
        try:
            plan.model.check(Fingerprint.of_any(shape))
        except ModelError as error:
            raise ModelError(f"plan {name!r} of {model.label}: {error}") from None
        plan.check_codebooks()
    _check_distinct(f"plans of {model.label}", [DENSE, *(name for name, _ in found)])
    return dict(found)


def _plan(entry: str | BudgetEntry, model: ModelEntry, shape: object) -> tuple[str, Plan]:
    if isinstance(entry, str):
        return find_plan(entry.replace(MODEL, model.label), shape)
    profile = Profile.load(entry.profile.replace(MODEL, model.label))
    return entry.label, allocate(profile, Budget.bits(entry.bits, entry.tokens))


def _check_distinct(what: str, names: Iterable[str]) -> None:
    counts = Counter(map(as_file, names))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{what}: {twice[0]!r} is there twice, and would share its folder: give one of them a name.")

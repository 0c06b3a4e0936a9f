"""One job, done in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom import Plan, load_model
from kvloom.bench import is_out_of_memory
from kvloom.errors import EXPECTED
from kvloom.evaluate import Contestant, Progress, choose, dense_contestant, evaluate, plan_contestant, plan_method
from kvloom.sweep._config import LmEvalEntry, ModelEntry
from kvloom.sweep._job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Performer:
    """Does jobs, one after the other; the model stays for the next job.

    Args:
        folder: the sweep's folder, or one with the files of the jobs' plans.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entry: ModelEntry | None = None
        self._loaded: tuple[PreTrainedModel, Any] | None = None

    def perform(self, job: Job, progress: Progress) -> None:
        """Write the job's records; finished pieces lie beside them, and a job that was cut goes on after its last one.

        Args:
            job: what to do.
            progress: told before every piece of work.

        Raises:
            DataError: the task does not fit the model.
            RuntimeError: memory ran out, among others.
        """
        out = self._folder / job.results
        model, tokenizer = self._model(job.model)
        contestant = self._contestant(job, model)
        task, name = job.task, job.model.name
        if not isinstance(task, LmEvalEntry):
            tasks = choose([task.task], task.settings).tasks
            evaluate(model, tokenizer, tasks, [contestant], name=name, out=out, progress=progress)
            return
        from kvloom.integrations.lm_eval import harness

        harness(
            model,
            tokenizer,
            task.tasks,
            [contestant],
            limit=task.limit,
            shots=task.shots,
            include=task.include,
            chat=task.chat,
            name=name,
            out=out,
            progress=progress,
        )

    def _model(self, entry: ModelEntry) -> tuple[PreTrainedModel, Any]:
        if self._loaded is None or entry != self._entry:
            self._loaded = None  # before the next one takes its memory
            self._loaded, self._entry = load_model(entry.model, dtype=entry.dtype), entry
        return self._loaded

    def _contestant(self, job: Job, model: PreTrainedModel) -> Contestant:
        if job.plan is None or job.plan_file is None:
            return dense_contestant(model)
        plan = Plan.load(self._folder / job.plan_file)
        return plan_contestant(plan, model, name=job.plan, method=plan_method(plan), prefill=job.prefill)


def why(error: Exception) -> str:
    """Why a job failed, in one sentence."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        return "memory ran out: give less length, or a device with more."
    if isinstance(error, EXPECTED):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())

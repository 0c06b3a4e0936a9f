"""The room's door: a sweep in, records out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from kvloom._ledger import Ledger, Record, fingerprint, parse_lines
from kvloom.errors import DataError
from kvloom.sweep._job import Job, plan_file
from kvloom.sweep._make import Jobs
from kvloom.sweep._processes import Processes
from kvloom.sweep._runner import Runner, Watch

JOBS = "jobs"
"""Who tells the progress of the sweep as a whole."""


@dataclass(frozen=True)
class Swept:
    """What a sweep came to.

    Attributes:
        records: of every model, by its name in the sweep, in the order of tasks and plans.
        failures: why a job failed, by the job's name.
    """

    records: Mapping[str, list[Record]]
    failures: Mapping[str, str]


def unwatched(who: str, what: str, done: int, total: int) -> None:
    """Progress nobody watches."""


def sweep(jobs: Jobs, folder: Path, *, runner: Runner | None = None, watch: Watch = unwatched) -> Swept:
    """Run the jobs that are not finished yet.

    The folder holds `results/MODEL/TASK/PLAN.jsonl` with finished pieces beside it, the plans, and logs. A job that is
    finished is not done again unless its settings, its plan, its files or the code have changed; one that was cut goes
    on after its last piece, with the records that it would have had.

    Args:
        jobs: from `make_jobs`.
        folder: of the results.
        runner: where the jobs run; by default one process for each GPU.
        watch: told before every piece of work.

    Returns:
        The records of all jobs that are finished, and why others are not.

    Raises:
        DataError: another sweep is running in the folder.
    """
    with _alone(folder):
        keys = _save_plans(jobs, folder)
        finished = _Finished(folder, keys)
        left = [job for job in jobs.jobs if job not in finished]
        done, total = len(jobs.jobs) - len(left), len(jobs.jobs)
        for job in left:
            (folder / job.results).unlink(missing_ok=True)  # of other settings
        watch(JOBS, "finished", done, total)
        failures: dict[str, str] = {}
        with closing((runner or Processes()).run(left, folder, watch)) as outcomes:
            for outcome in outcomes:
                if outcome.failure is None:
                    finished.add(outcome.job)
                else:
                    failures[outcome.job.name] = outcome.failure
                done += 1
                watch(JOBS, f"finished, {len(failures)} failed" if failures else "finished", done, total)
        records = _records([job for job in jobs.jobs if job in finished], folder)
        return Swept(records, {name: failures[name] for name in keys if name in failures})


class _Finished:
    """The jobs that are finished: their records are those of the same work, and as they were written.

    Args:
        folder: the sweep's.
        keys: of all jobs, by name.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str]) -> None:
        self._folder = folder
        self._keys = keys
        self._ledger = Ledger(folder / "finished.jobs")

    def __contains__(self, job: Job) -> bool:
        place = str(job.results)
        return place in self._ledger and self._ledger[place]["finished"] == self._state(job)

    def add(self, job: Job) -> None:
        """Keep that a job is finished."""
        self._ledger.add("job", str(job.results), {"finished": self._state(job)})

    def _state(self, job: Job) -> str:
        file = self._folder / job.results
        content = sha256(file.read_bytes()).hexdigest() if file.exists() else None
        return fingerprint([self._keys[job.name], content])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of the folder."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"Another sweep is running in {folder}: wait for it, or give another folder.") from None
    try:
        yield
    finally:
        lock.release()


def _save_plans(jobs: Jobs, folder: Path) -> dict[str, str]:
    """Write every plan where its jobs look for it; the key of every job, by its name."""
    for model in {job.model.label: job.model for job in jobs.jobs}.values():
        for name, plan in jobs.plans[model.label].items():
            file = folder / plan_file(model, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            plan.save(file)
    return {job.name: job.key(None if job.plan is None else jobs.plans[job.model.label][job.plan]) for job in jobs.jobs}


def _records(finished: list[Job], folder: Path) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {}
    for job in finished:
        file = folder / job.results
        found = parse_lines(file, file.read_text(encoding="utf-8")) if file.exists() else ()
        records.setdefault(job.model.label, []).extend(found)
    return records

"""Sweeps: models x plans x tasks, in many processes, resumed where they stopped.

jobs = make_jobs(Sweep.load("sweep.yaml"))
swept = sweep(jobs, Path("runs/sweep"))
print(swept.failures)
"""

from __future__ import annotations

from kvloom.sweep._config import BudgetEntry, LmEvalEntry, ModelEntry, Sweep, TaskEntry
from kvloom.sweep._job import Job
from kvloom.sweep._make import Jobs, make_jobs
from kvloom.sweep._perform import Performer, why
from kvloom.sweep._processes import Processes
from kvloom.sweep._runner import Outcome, Runner, Watch
from kvloom.sweep._sweep import JOBS, Swept, sweep, unwatched

__all__ = [
    "JOBS",
    "BudgetEntry",
    "Job",
    "Jobs",
    "LmEvalEntry",
    "ModelEntry",
    "Outcome",
    "Performer",
    "Processes",
    "Runner",
    "Sweep",
    "Swept",
    "TaskEntry",
    "Watch",
    "make_jobs",
    "sweep",
    "unwatched",
    "why",
]

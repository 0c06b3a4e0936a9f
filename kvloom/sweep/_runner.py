"""What runs jobs: the contract of runners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvloom.sweep._job import Job

Watch = Callable[[str, str, int, int], None]
"""`(who, what, done, total)`, called by a worker before each piece of work.

A `total` of 0 is not known, and with no `what` the worker is gone.
"""


@dataclass(frozen=True)
class Outcome:
    """A job that has ended.

    Attributes:
        job: the job.
        failure: why it failed, in one sentence; None if its records are written.
    """

    job: Job
    failure: str | None


class Runner(ABC):
    """Runs jobs in processes somewhere."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], folder: Path, watch: Watch) -> Generator[Outcome]:
        """Run jobs in about their order; one that fails does not stop the others.

        Records and pieces lie in the folder when an outcome comes. Whoever stops before the last outcome ends all
        workers.

        Args:
            jobs: what to run.
            folder: the sweep's, which has the plans and the pieces of jobs that were cut.
            watch: told before every piece of work, in any thread.

        Raises:
            MissingExtraError: the runner needs a package that is not installed.
        """

"""A worker process: jobs come in on stdin, one JSON line each, and what becomes of them goes out on stdout.

It ends with the process that started it, at once, so that a sweep that begins again never meets an old worker.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TextIO

from kvloom.sweep._job import Job
from kvloom.sweep._perform import Performer, why


def main(folder: Path) -> None:
    """Do jobs until one fails, which may leave memory held, or stdin closes.

    Answers are `{"what", "done", "total"}` before each piece of work, and `{"ended"}` with null or why a job failed.

    Args:
        folder: the sweep's.
    """
    answers = _own_stdout()
    jobs: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(jobs,), daemon=True).start()
    performer = Performer(folder)
    failure = None

    def progress(what: str, done: int, total: int) -> None:
        _say(answers, what=what, done=done, total=total)

    while failure is None:
        job = Job.model_validate_json(jobs.get())
        try:
            performer.perform(job, progress)
        except Exception as error:
            traceback.print_exc()
            failure = why(error)
        _say(answers, ended=failure)


def _own_stdout() -> TextIO:
    """The stdout that the process was given; whatever else prints goes to stderr, which is a log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _read(jobs: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)  # the main thread may be deep in a forward pass


def _say(answers: TextIO, **answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
